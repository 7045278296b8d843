"""The method as pure functions and hooks: what a site minimises, what disturbs it, what the server makes of updates."""
