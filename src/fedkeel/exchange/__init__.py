"""What travels: messages, their codecs, and the steps between training and aggregation."""
