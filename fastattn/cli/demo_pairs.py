"""Sentence pairs of the demo. Their lengths differ much: a batch of them is mostly padding."""

SIMILAR = "similar"
TOPIC = "topic only"
UNRELATED = "unrelated"

HEAT_MAP_SENTENCE = (
    "While the chef tasted the soup, the waiter opened a bottle and the guests told old stories."
)

PAIRS: tuple[tuple[str, str, str], ...] = (
    (
        SIMILAR,
        HEAT_MAP_SENTENCE,
        "The diners were chatting about the past; wine was uncorked at their table, and in the "
        "kitchen the cook tried the broth.",
    ),
    (SIMILAR, "How do I reset my password?", "I forgot my login and need a new one."),
    (SIMILAR, "It is pouring.", "Heavy rain is coming down outside."),
    (
        SIMILAR,
        "The committee postponed the vote until the auditors have explained why the figures for "
        "the last two quarters do not agree with those that the treasurer presented in March, and "
        "asked him to be there when they do.",
        "No vote was taken, because the accounts still contradict the treasurer's earlier report; "
        "the auditors are to say why at the next meeting, which he has to attend as well.",
    ),
    (
        TOPIC,
        "The violinist tuned her instrument.",
        "Our orchestra is looking for somebody who repairs double basses, lends out bows, can "
        "drive a van, and does not mind working on Sundays and on the evenings before a concert.",
    ),
    (TOPIC, "The bakery sells rye bread.", "Yeast dies at high temperatures."),
    (
        TOPIC,
        "Glaciers in the Alps have lost about half of their volume since the middle of the "
        "nineteenth century, and the loss has become faster in every decade since 1980.",
        "She learned to ski on a glacier, where the season lasts until June and the runs are so "
        "wide that a beginner has nobody to be afraid of but herself.",
    ),
    (
        TOPIC,
        "The goalkeeper was injured in the second half and is out for the rest of the season, as "
        "the club announced this morning after the doctors had seen the pictures of his knee.",
        "Ticket prices for the stadium rise again next year.",
    ),
    (UNRELATED, "Photosynthesis turns light into sugar.", "The meeting moved to Thursday."),
    (
        UNRELATED,
        "Thanks!",
        "Copper conducts electricity better than iron does, but it is heavier than aluminum and "
        "costs more, which is why the lines between the pylons are made of neither.",
    ),
    (
        UNRELATED,
        "When the ferry finally left the harbor, three hours late and with half of its lights out, "
        "the passengers who had spent the night on the benches of the waiting hall were too tired "
        "to complain; they lay down between the lifeboats, used their bags as pillows, and woke "
        "only when the gulls of the island began to scream above them, long after the sun had come "
        "up, with the smell of coffee drifting over from the bridge. Nobody had noticed the second "
        "ship, which lay at the only pier, its bow doors open, with two trucks wedged into each "
        "other on the ramp and a policeman standing between them, writing slowly, as if the whole "
        "morning belonged to him.",
        "Divide both sides of the equation by two.",
    ),
    (
        UNRELATED,
        "He plays the trumpet.",
        "Unless one of the parties has given notice in writing at least three months before, the "
        "contract, which would otherwise end in June, is renewed on the same terms for a year.",
    ),
)
