"""Using a trained model: noise to pictures, pictures to answers, both to measures."""
