"""The conformance kit: tests that any method can inherit. Needs the extra `testing`."""
