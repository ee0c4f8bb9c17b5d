"""Every promise of the reliability page, shown on real processes."""
