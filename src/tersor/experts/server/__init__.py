"""Many experts behind one endpoint that speaks OpenAI's wire format."""
