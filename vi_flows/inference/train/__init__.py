"""A flow and a target in, the flow trained by reverse KL out."""
