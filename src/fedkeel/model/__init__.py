"""A frozen base model with one adapter in it. The only room that imports peft."""
