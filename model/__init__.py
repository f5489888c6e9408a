"""What is computed: torch modules and the objects they are made of. Imports none of our other folders."""
