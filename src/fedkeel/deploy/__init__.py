"""Several machines: keys, certificates, scripts and checks."""
