"""A generated world of flat shapes: scenes, pictures, captions, questions, edits, and a reader of pixels."""
