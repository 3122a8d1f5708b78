"""The whole method on one small model, in one run. Imports: tensors, selection, weights, scoring, optim."""
