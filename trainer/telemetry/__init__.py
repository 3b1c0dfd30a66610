"""What a run says of itself: metrics, router statistics, times, FLOPs, its page."""
