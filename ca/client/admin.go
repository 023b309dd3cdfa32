package client

import (
	"context"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// Admin opens the administrative door of the nearest CA node that answers; what it lets
// through is decided by the roles of this client's SVID. close ends the connection.
func (c *Client) Admin(ctx context.Context) (door ententev1.AdminClient, close func(), err error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	return ententev1.NewAdminClient(conn.rpc), conn.close, nil
}
