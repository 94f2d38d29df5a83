"""What draws and their weights tell: arrays in, numbers out; and a target evaluated in blocks."""
