"""What a person sees of a run: the screen while it trains, the summary at its end, and the trackers."""
