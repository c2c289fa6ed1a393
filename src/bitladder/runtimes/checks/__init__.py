"""What pre-flight checks, by what is looked at; `preflight.py` makes one of all."""
