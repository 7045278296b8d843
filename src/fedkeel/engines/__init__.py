"""Sites that are elsewhere: a site's work and memory, its warm process, the coordinator of a deployment, Flower."""
