package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// keyPrefix begins the names of authority keys in the key store.
const keyPrefix = "x509-"

// loadAuthorityKeys gives the signer every authority key in the store.
func (n *Node) loadAuthorityKeys() error {
	names, err := n.own.keys.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, keyPrefix) {
			continue
		}
		key, err := n.own.keys.Load(name)
		if err != nil {
			return err
		}
		if _, err := n.signer.Add(key); err != nil {
			return err
		}
	}
	return nil
}

// runAuthorities takes this node's X.509 authorities through their phases: always one
// PREPARED and one ACTIVE. Each step is agreed before it is used; the key is on the disk
// before it is proposed.
func (n *Node) runAuthorities(ctx context.Context) error {
	failed := ""
	for {
		changed := n.applied.wait()
		if err := n.stepAuthorities(ctx); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != failed {
				failed = text
				n.log.Warn("this node's authorities cannot move on; trying again", "error", err)
			}
		} else {
			failed = ""
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ownAuthorities is what the state says of this node's.
type ownAuthorities struct {
	member   *statev1.Member
	phase    time.Duration
	now      time.Time // agreed
	active   *statev1.Authority
	prepared *statev1.Authority
	known    map[string]*statev1.Authority // of any phase
}

func (n *Node) ownAuthorities() (own ownAuthorities) {
	n.Read(func(st *domain.State) {
		own.member, _ = st.Member(n.own.id)
		own.phase, own.now = st.Lifetimes().Phase, st.Now()
		own.known = make(map[string]*statev1.Authority)
		for _, a := range st.Authorities() {
			if a.GetMemberId() != n.own.id || a.GetUse() != statev1.KeyUse_KEY_USE_X509 {
				continue
			}
			own.known[a.GetId()] = a
			switch a.GetPhase() {
			case statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
				own.active = a
			case statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
				own.prepared = a
			}
		}
	})
	return own
}

func (n *Node) stepAuthorities(ctx context.Context) error {
	own := n.ownAuthorities()
	if !own.member.GetSigning() {
		return nil // not admitted as far as this state knows, or a witness
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if own.member.GetRaftAddress() != n.cfg.Advertise.Raft || own.member.GetApiAddress() != n.cfg.Advertise.API {
		if err := n.moveMember(ctx); err != nil {
			return err
		}
	}
	switch {
	case own.prepared == nil:
		_, err := n.prepareAuthority(ctx, own)
		return err
	case own.prepared.GetReady() && n.mayActivate(own):
		err := n.agreeSelf(ctx, &statev1.Command{
			Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: own.prepared.GetId()}},
		})
		if err != nil {
			return fmt.Errorf("activate authority %.12s: %w", own.prepared.GetId(), err)
		}
		n.log.Info("authority signs from now on", "authority", own.prepared.GetId())
	}
	return n.dropKeys(own)
}

// moveMember tells everybody where this node is reached now.
func (n *Node) moveMember(ctx context.Context) error {
	outcome, err := n.Propose(ctx, &statev1.Command{
		Actor: n.cfg.Name,
		Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
			Id: n.own.id, RaftAddress: n.cfg.Advertise.Raft, ApiAddress: n.cfg.Advertise.API,
		}},
	})
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("announce this node's addresses: %w", err)
	}
	return nil
}

// mayActivate: the first authority at once, each next one when it has been PREPARED for
// a phase, or when the ACTIVE one is over.
func (n *Node) mayActivate(own ownAuthorities) bool {
	now := time.Now()
	if own.active == nil || now.Unix() >= own.active.GetNotAfter() {
		return true
	}
	made := time.Unix(own.prepared.GetNotAfter(), 0).Add(-3 * own.phase)
	return now.Sub(made) >= own.phase
}

// agreeSelf has something agreed that this node decided by itself, and records it.
func (n *Node) agreeSelf(ctx context.Context, command *statev1.Command) error {
	command.Actor = "CA node " + n.cfg.Name
	outcome, err := n.Propose(ctx, command)
	if err != nil {
		return err // nothing is known to have happened; it will be tried again
	}
	n.audit.Command(command, outcome, nil)
	if outcome.Refused != nil {
		return outcome.Refused
	}
	return nil
}

// prepareNow prepares an authority because an operator wants one.
func (n *Node) prepareNow(ctx context.Context) (id string, err error) {
	own := n.ownAuthorities()
	switch {
	case !own.member.GetSigning():
		return "", errors.New("this CA node does not sign")
	case own.prepared != nil:
		return own.prepared.GetId(), nil
	}
	return n.prepareAuthority(ctx, own)
}

func (n *Node) prepareAuthority(ctx context.Context, own ownAuthorities) (id string, err error) {
	n.preparing.Lock() // the schedule and an operator want one at the same time
	defer n.preparing.Unlock()
	if now := n.ownAuthorities(); now.prepared != nil {
		return now.prepared.GetId(), nil
	}
	key, err := n.freshKey(own)
	if err != nil {
		return "", err
	}
	authority, err := n.makeAuthority(key, own.phase)
	if err != nil {
		return "", err
	}
	err = n.agreeSelf(ctx, &statev1.Command{
		Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: authority}},
	})
	if err != nil {
		return "", fmt.Errorf("prepare authority %.12s: %w", authority.GetId(), err)
	}
	n.log.Info("authority is in the bundle", "authority", authority.GetId())
	return authority.GetId(), nil
}

// freshKey returns a key that was made for an authority and never became one, or a new
// one.
func (n *Node) freshKey(own ownAuthorities) (crypto.Signer, error) {
	names, err := n.own.keys.Names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, keyPrefix) {
			continue
		}
		key, err := n.own.keys.Load(name)
		if err != nil {
			return nil, err
		}
		id, err := n.signer.Add(key)
		if err != nil {
			return nil, err
		}
		if own.known[id] == nil {
			return key, nil
		}
	}
	key, err := n.own.keys.Create(keyPrefix + newBootID())
	if err != nil {
		return nil, err
	}
	_, err = n.signer.Add(key)
	return key, err
}

func (n *Node) makeAuthority(key crypto.Signer, phase time.Duration) (*statev1.Authority, error) {
	var serial [16]byte
	rand.Read(serial[:])
	now := time.Now()
	template, err := ca.AuthorityTemplate(ca.AuthorityRequest{
		TrustDomain: n.td, PublicKey: key.Public(), Serial: serial, Now: now, Phase: phase,
	})
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the authority certificate: %w", err)
	}
	return ca.NewAuthority(n.td, n.own.id, der, phase, now)
}

// dropKeys deletes the keys of authorities that will never sign again.
func (n *Node) dropKeys(own ownAuthorities) error {
	var over bool
	for id, a := range own.known {
		if a != own.active && a != own.prepared && n.signer.Has(id) {
			over = true
		}
	}
	if !over {
		return nil
	}
	names, err := n.own.keys.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, keyPrefix) {
			continue
		}
		key, err := n.own.keys.Load(name)
		if err != nil {
			return err
		}
		id, err := n.signer.Add(key)
		if err != nil {
			return err
		}
		if a := own.known[id]; a != nil && a != own.active && a != own.prepared {
			if err := n.own.keys.Delete(name); err != nil {
				return err
			}
			n.signer.Remove(id)
			n.log.Info("the key of an authority that signs no more was deleted", "authority", id, "phase", ca.PhaseName(a.GetPhase()))
		}
	}
	return nil
}
