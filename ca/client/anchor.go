package client

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

// Anchor is whom a client believes as its CA, to be kept over a restart: a later process
// then trusts no node on first use again. It holds no secret.
type Anchor struct {
	Cluster     *statev1.Cluster
	Members     []*statev1.Member
	RecoveryKey []byte            // pinned
	Confirmed   []*statev1.Member // the last table that two CA nodes agreed on
}

// Anchor is what the client believes now; its Cluster is nil before the first picture.
func (c *Client) Anchor() Anchor {
	view := c.View()
	return Anchor{view.Cluster, view.Members, c.RecoveryKey(), c.Confirmed()}
}

// Marshal encodes an anchor.
func (a Anchor) Marshal() ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(&ententev1.Picture{
		Policy: &ententev1.Policy{Cluster: a.Cluster, Members: a.Members}, RecoveryKey: a.RecoveryKey, Confirmed: a.Confirmed,
	})
}

// ParseAnchor reads what Marshal wrote.
func ParseAnchor(data []byte) (Anchor, error) {
	picture := &ententev1.Picture{}
	if err := proto.Unmarshal(data, picture); err != nil {
		return Anchor{}, fmt.Errorf("what was kept of the CA cannot be read: %w", err)
	}
	a := Anchor{picture.GetPolicy().GetCluster(), picture.GetPolicy().GetMembers(), picture.GetRecoveryKey(), picture.GetConfirmed()}
	if a.Cluster == nil || len(a.Members) == 0 {
		return Anchor{}, errors.New("what was kept of the CA names no CA node")
	}
	return a, nil
}

// ParseRecoveryKey reads the public half of a recovery key from its text.
func ParseRecoveryKey(text string) ([]byte, error) { return ca.ParseRecoveryPublic(text) }
