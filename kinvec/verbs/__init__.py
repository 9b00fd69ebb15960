"""One thin file a verb: a function of the verb's name, and `command`, which reads arguments, calls it and prints."""
