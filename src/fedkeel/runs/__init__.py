"""A whole run: data to sites, legs, the round loop, and the folder that it leaves."""
