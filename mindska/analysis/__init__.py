"""Looking inside networks: what they attend to, what they see, where they err, and what they withstand."""
