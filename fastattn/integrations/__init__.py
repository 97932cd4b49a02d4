"""fastattn inside other libraries: one module each, which imports that library."""
