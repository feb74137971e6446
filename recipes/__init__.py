"""The shipped recipes, and `schema.json`, the JSON schema of the grammar. Data only; read them with `fp8fx.Recipe.load(name)`."""
