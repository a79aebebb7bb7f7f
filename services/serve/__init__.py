"""What Ray Serve runs: gateway, proposer replicas, selector replicas."""
