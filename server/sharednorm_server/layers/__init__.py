"""What a request means: the layers of a server and the service that answers for them."""
