"""What a run, or one update, gives away: canaries, membership, inversion."""
