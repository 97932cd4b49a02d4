"""What the demo asks a language model: one system message, and questions of different lengths."""

SYSTEM = (
    "You are a patient assistant. Answer in plain English, in whole sentences, and give a reason "
    "for everything that you recommend."
)

QUESTIONS = (
    "Why is the sky red in the evening?",
    "Describe three ways to find north without a compass, and say when each of them fails.",
    "Write the beginning of a story about a lighthouse keeper who finds a letter in a bottle. It "
    "should be quiet, and the reader should not learn yet who wrote the letter.",
    "My bread comes out dense and pale. I use 500 g of flour, 300 g of water, 7 g of yeast and "
    "10 g of salt, let the dough rest for 40 minutes, and bake it for half an hour at 180 degrees. "
    "What would you change first?",
    "Sum this up for somebody who missed the meeting: The pump at the north well failed again on "
    "Tuesday, and the spare one had been lent to the school. Until it is back, water is carried "
    "from the river, which costs two people half a day. The council will pay for a second spare "
    "pump if the school takes part, and the school wants to know by Friday how often it would "
    "be allowed to borrow it.",
)
