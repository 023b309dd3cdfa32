package client

import (
	"context"
	"errors"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Proof is what a node shows to be admitted. Statement is an encoded
// statev1.JoinStatement that names the exporter of the connection.
type Proof struct {
	TokenID   string // empty: by the key that a token admitted before
	Statement []byte
	Signature []byte
}

// Attestation is the CA's answer: who the node is now, and whom to believe.
type Attestation struct {
	Certificates [][]byte // DER, leaf first
	Bundle       []byte   // SPIFFE bundle of the own domain, JSON
	Members      []*statev1.Member
	Cluster      *statev1.Cluster
	Agent        *statev1.Agent
}

// Attest asks CA nodes one after the other to admit the key of csr (PKCS#10,
// DER). prove is called once per connection with its 32-byte TLS exporter, so
// that a proof is worth nothing on another connection. ErrDenied means that
// trying again with the same proof is of no use.
func Attest(ctx context.Context, cfg Config, prove func(exporter []byte) (Proof, error), csr []byte) (*Attestation, error) {
	return nil, errors.ErrUnsupported
}
