"""What a user declares: the InferenceService, as typed and strict models. The operator that acts on it comes later."""
