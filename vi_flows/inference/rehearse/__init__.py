"""What is judged in, refits of data like those that were fitted out, whose answers are known."""
