"""What is judged in, the same with draws that are annealed, resampled or moved by chains out, judged anew."""
