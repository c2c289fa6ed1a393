"""What a model is: which of its modules runtimes fuse."""
