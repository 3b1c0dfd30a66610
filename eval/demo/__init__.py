"""The built-in scenes as a prompt set: their prompts and true pictures, and a detector that knows them."""
