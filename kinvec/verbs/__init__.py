"""One thin file a verb: a public function of the verb's name, and `command`, which reads arguments, calls it and prints."""
