"""Turns batches into a trained model: one loop over a Task, distributed by an engine, resumable at any step."""
