"""What the owner of a site allows: policy, approvals, and the guard that every message passes."""
