"""Does a picture show what its caption says? A reader trained on drawn pictures, the scoring, and the command."""
