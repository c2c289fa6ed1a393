"""One sensitivity measurement of a model, by our own engine or ModelOpt's."""
