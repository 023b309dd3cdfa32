package client

import (
	"context"
	"errors"
)

// SignRequest asks for one X.509-SVID.
type SignRequest struct {
	EntryID string // empty: the agent's own SVID
	CSR     []byte // PKCS#10, DER; only its key is used
}

// SignResult is the answer to one SignRequest.
type SignResult struct {
	Certificates [][]byte // DER, leaf first
	Err          error    // ErrDenied (no such entry on this host), ErrUnreachable, or another
}

// SignX509 has SVIDs signed, in batches of at most 100. Results stand in the order of
// requests. The error is ErrUnreachable when no node answered at all.
func (c *Client) SignX509(ctx context.Context, requests []SignRequest) ([]SignResult, error) {
	return nil, errors.ErrUnsupported
}
