package client

import "context"

type conn struct{}

func (c *Client) sync(ctx context.Context, handle func(*View) error) error { return nil }
