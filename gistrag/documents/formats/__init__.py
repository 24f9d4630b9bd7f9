"""One reader for each file format: a function from the bytes of a file to its `Text`."""
