package client

import (
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

// Picture is what View shows, in a form to be kept and given to Recall by a later
// process. It holds no secret. Nil: there is none yet.
func (c *Client) Picture() ([]byte, error) {
	picture := c.store.picture()
	if picture == nil {
		return nil, nil
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(picture)
}

// Recall takes up a picture of a former process, before Sync runs: a session with the same
// CA node then resumes where that one had been, and until there is one its instances count as stale
// (I12). What another cluster or trust domain has sent is refused, as in a session.
func (c *Client) Recall(data []byte) error {
	picture := &ententev1.Picture{}
	if err := proto.Unmarshal(data, picture); err != nil {
		return fmt.Errorf("the picture of the CA that was kept cannot be read: %w", err)
	}
	if p := picture.GetPolicy(); !p.GetFull() || !p.GetLast() {
		return errors.New("the picture of the CA that was kept is not whole")
	}
	// What another release kept lacks what it did not know: it serves until the first session
	// has sent the full state.
	c.whole = picture.GetLevel() != ca.SyncLevel
	c.store.attach(picture.GetSource())
	if err := c.store.policy(picture.GetPolicy()); err != nil {
		return fmt.Errorf("the picture of the CA that was kept: %w", err)
	}
	c.store.presence(picture.GetPresence())
	c.store.disown()
	return nil
}

// picture is the inverse of attach, policy and presence.
func (s *Store) picture() *ententev1.Picture {
	s.mu.Lock()
	defer s.mu.Unlock()
	view := s.view
	if view.Revision == 0 {
		return nil
	}
	presence := &ententev1.Presence{Complete: true}
	for _, i := range view.Instances {
		presence.Instances = append(presence.Instances, instanceToWire(i))
	}
	policy := s.state.Everything(view.Revision).Encode(math.MaxInt)[0]
	return &ententev1.Picture{Policy: policy, Presence: presence, Level: ca.SyncLevel, Source: s.source}
}
