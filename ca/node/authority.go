package node

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// use is one kind of authority: each has a key of its own, so that a signature made
// for one protocol means nothing in another (Trust Domain and Bundle 6.2).
type use struct {
	of     statev1.KeyUse
	name   string // in the log
	prefix string // of the names of its keys in the key store
}

var uses = []use{
	{statev1.KeyUse_KEY_USE_X509, "X.509", "x509-"},
	{statev1.KeyUse_KEY_USE_JWT, "JWT", "jwt-"},
	{statev1.KeyUse_KEY_USE_WIT, "WIT", "wit-"},
}

// loadAuthorityKeys gives the signer every authority key in the store.
func (n *Node) loadAuthorityKeys() error {
	names, err := n.own.keys.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.ContainsFunc(uses, func(u use) bool { return strings.HasPrefix(name, u.prefix) }) {
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

// runAuthorities takes this node's authorities of each use through their phases: always
// one PREPARED and one ACTIVE. Each step is agreed before it is used; the key is on the disk
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

// ownAuthorities is what the state says of this node's, of one use.
type ownAuthorities struct {
	use      use
	member   *statev1.Member
	phase    time.Duration
	now      time.Time // agreed
	active   *statev1.Authority
	prepared *statev1.Authority
	known    map[string]*statev1.Authority // of any phase
}

func (n *Node) ownAuthorities(u use) (own ownAuthorities) {
	own.use = u
	n.Read(func(st *domain.State) {
		own.member, _ = st.Member(n.own.id)
		own.phase, own.now = st.Lifetimes().Phase, st.Now()
		own.known = make(map[string]*statev1.Authority)
		for _, a := range st.Authorities() {
			if a.GetMemberId() != n.own.id || a.GetUse() != u.of {
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
	member := n.ownAuthorities(uses[0]).member
	if member == nil {
		return nil // not admitted as far as this state knows
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if member.GetRaftAddress() != n.cfg.Advertise.Raft || member.GetApiAddress() != n.cfg.Advertise.API || member.GetFeatureLevel() != n.cfg.level() {
		if err := n.moveMember(ctx); err != nil {
			return err
		}
	}
	if !member.GetSigning() {
		return nil // a witness
	}
	// All of them also when one fails: X.509 does not wait for tokens.
	var errs []error
	for _, u := range uses {
		errs = append(errs, n.stepAuthority(ctx, n.ownAuthorities(u)))
	}
	return errors.Join(errs...)
}

func (n *Node) stepAuthority(ctx context.Context, own ownAuthorities) error {
	switch {
	case own.prepared == nil:
		_, err := n.prepareAuthority(ctx, own)
		return err
	case own.prepared.GetReady() && n.mayActivate(own):
		err := n.agreeSelf(ctx, &statev1.Command{
			Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: own.prepared.GetId()}},
		})
		if err != nil {
			return fmt.Errorf("activate %s authority %.12s: %w", own.use.name, own.prepared.GetId(), err)
		}
		n.log.Info("authority signs from now on", "authority", own.prepared.GetId(), "use", own.use.name)
	}
	return n.dropKeys(own)
}

// moveMember tells everybody where this node is reached now, and what it carries out.
func (n *Node) moveMember(ctx context.Context) error {
	outcome, err := n.Propose(ctx, &statev1.Command{
		Actor: n.cfg.Name,
		Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
			Id: n.own.id, RaftAddress: n.cfg.Advertise.Raft, ApiAddress: n.cfg.Advertise.API,
			FeatureLevel: n.cfg.level(),
		}},
	})
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("announce this node's addresses and feature level: %w", err)
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
	if begin := time.Unix(own.prepared.GetNotBefore(), 0); made.Before(begin) {
		made = begin // its upstream ends sooner than in three phases
	}
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
	own := n.ownAuthorities(uses[0]) // X.509; tokens are renewed by the schedule alone
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
	if now := n.ownAuthorities(own.use); now.prepared != nil {
		return now.prepared.GetId(), nil
	}
	key, err := n.freshKey(own)
	if err != nil {
		return "", err
	}
	authority, err := n.makeAuthority(ctx, key, own)
	if err != nil {
		return "", err
	}
	err = n.agreeSelf(ctx, &statev1.Command{
		Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: authority}},
	})
	if err != nil {
		return "", fmt.Errorf("prepare %s authority %.12s: %w", own.use.name, authority.GetId(), err)
	}
	n.log.Info("authority is in the bundle", "authority", authority.GetId(), "use", own.use.name)
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
		if !strings.HasPrefix(name, own.use.prefix) {
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
		if own.known[id] == nil && n.suits(own.use, key) {
			return key, nil
		}
	}
	create := n.own.keys.Create
	if own.use.of == statev1.KeyUse_KEY_USE_JWT && n.cfg.Keys.JWT == ca.RS256 {
		create = n.own.keys.CreateRSA
	}
	key, err := create(own.use.prefix + newBootID())
	if err != nil {
		return nil, err
	}
	_, err = n.signer.Add(key)
	return key, err
}

// suits: the key was made for the algorithm that the configuration asks for now.
func (n *Node) suits(u use, key crypto.Signer) bool {
	if u.of != statev1.KeyUse_KEY_USE_JWT {
		return true
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	return err == nil && alg == cmp.Or(n.cfg.Keys.JWT, ca.ES256)
}

func (n *Node) makeAuthority(ctx context.Context, key crypto.Signer, own ownAuthorities) (*statev1.Authority, error) {
	phase := own.phase
	if own.use.of != statev1.KeyUse_KEY_USE_X509 {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		now := time.Now()
		return ca.NewTokenAuthority(n.own.id, own.use.of, spki, now, phase, now)
	}
	var serial [16]byte
	rand.Read(serial[:])
	now := time.Now()
	request := ca.AuthorityRequest{TrustDomain: n.td, PublicKey: key.Public(), Serial: serial, Now: now, Phase: phase}
	if n.upstream != nil {
		return n.certifiedAuthority(ctx, key, request)
	}
	template, err := ca.AuthorityTemplate(request)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the authority certificate: %w", err)
	}
	return ca.NewAuthority(n.td, n.own.id, der, nil, phase, now)
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
		if !strings.HasPrefix(name, own.use.prefix) {
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
