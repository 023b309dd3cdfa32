package node

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/rotation"
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

func (n *Node) ownAuthorities(u use) (own rotation.Own) {
	n.Read(func(st *domain.State) { own = rotation.OwnOf(st, n.own.id, u.of) })
	return own
}

func (n *Node) stepAuthorities(ctx context.Context) error {
	member := n.ownAuthorities(uses[0]).Member
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
		errs = append(errs, n.stepAuthority(ctx, u, n.ownAuthorities(u)))
	}
	return errors.Join(errs...)
}

func (n *Node) stepAuthority(ctx context.Context, u use, own rotation.Own) error {
	if err := n.reconcile(ctx, own, u); err != nil {
		return err
	}
	switch {
	case own.Prepared == nil:
		_, err := n.prepareAuthority(ctx, u)
		return err
	case !n.signer.Has(own.Prepared.GetId()):
		// A node that was restored without its keys: it can never use it.
		n.log.Error("the key of this node's PREPARED authority is lost: giving it up for another one", "authority", own.Prepared.GetId(), "use", u.name)
		return n.agreeSelf(ctx, &statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: own.Prepared.GetId()}}})
	case own.Prepared.GetReady() && !n.offline.has(own.Prepared.GetId()) && n.due(u, own):
		if !n.noQuorumSince(time.Now()).IsZero() {
			return n.activateOffline(own.Prepared.GetId(), "CA node "+n.cfg.Name)
		}
		return n.activate(ctx, u, own.Prepared)
	}
	return n.dropKeys(u, own)
}

// due: by schedule the PREPARED authority is to be used. With quorum the agreed time
// counts, so that no clock alone moves anything; without, this node's own.
func (n *Node) due(u use, own rotation.Own) bool {
	now := own.Agreed
	if !n.noQuorumSince(time.Now()).IsZero() {
		now = n.wall()
	}
	var longest time.Duration
	n.Read(func(st *domain.State) { longest = rotation.LongestOf(st)[u.of] })
	return own.Due(now, longest)
}

// coming is closed with the next change of the state if runAuthorities is about to activate
// the PREPARED authority, there being no other; nil: it is not.
func (n *Node) coming(of statev1.KeyUse) <-chan struct{} {
	i := slices.IndexFunc(uses, func(u use) bool { return u.of == of })
	if i < 0 || n.replica.Load() == nil {
		return nil
	}
	changed := n.applied.wait()
	own := n.ownAuthorities(uses[i])
	if own.Active != nil || !own.Prepared.GetReady() || !n.signer.Has(own.Prepared.GetId()) || !n.due(uses[i], own) {
		return nil
	}
	return changed
}

func (n *Node) activate(ctx context.Context, u use, a *statev1.Authority) error {
	err := n.agreeSelf(ctx, &statev1.Command{
		Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: a.GetId()}},
	})
	if err != nil {
		return fmt.Errorf("activate %s authority %.12s: %w", u.name, a.GetId(), err)
	}
	n.log.Info("authority signs from now on", "authority", a.GetId(), "use", u.name)
	return nil
}

// moveMember tells everybody where this node is reached now, and what it carries out.
func (n *Node) moveMember(ctx context.Context) error {
	outcome, err := n.Propose(ctx, n.byItself(&statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
		Id: n.own.id, RaftAddress: n.cfg.Advertise.Raft, ApiAddress: n.cfg.Advertise.API,
		FeatureLevel: n.cfg.level(),
	}}}))
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("announce this node's addresses and feature level: %w", err)
	}
	return nil
}

// agreeSelf has something agreed that this node decided by itself, and records it.
func (n *Node) agreeSelf(ctx context.Context, command *statev1.Command) error {
	outcome, err := n.Propose(ctx, n.byItself(command))
	if err != nil {
		return err // nothing is known to have happened; it will be tried again
	}
	n.audit.Command(command, outcome, nil)
	if outcome.Refused != nil {
		return outcome.Refused
	}
	return nil
}

// prepareNow prepares an authority of one use because an operator wants one.
func (n *Node) prepareNow(ctx context.Context, of statev1.KeyUse) (id string, err error) {
	i := slices.IndexFunc(uses, func(u use) bool { return u.of == of })
	if i < 0 {
		return "", fmt.Errorf("%s is no use of an authority", of)
	}
	if !n.ownAuthorities(uses[i]).Member.GetSigning() {
		return "", errors.New("this CA node does not sign")
	}
	return n.prepareAuthority(ctx, uses[i])
}

func (n *Node) prepareAuthority(ctx context.Context, u use) (id string, err error) {
	n.preparing.Lock() // the schedule and an operator want one at the same time
	defer n.preparing.Unlock()
	own := n.ownAuthorities(u)
	if own.Prepared != nil {
		return own.Prepared.GetId(), nil
	}
	key, err := n.freshKey(u, own)
	if err != nil {
		return "", err
	}
	authority, err := n.makeAuthority(ctx, key, u, own)
	if err != nil {
		return "", err
	}
	proposal, err := n.signAuthority(authority)
	if err != nil {
		return "", err
	}
	err = n.agreeSelf(ctx, &statev1.Command{Body: &statev1.Command_PrepareAuthority{PrepareAuthority: proposal}})
	if err != nil {
		return "", fmt.Errorf("prepare %s authority %.12s: %w", u.name, authority.GetId(), err)
	}
	n.log.Info("authority is in the bundle", "authority", authority.GetId(), "use", u.name)
	return authority.GetId(), nil
}

// freshKey returns a key that was made for an authority and never became one, or a new
// one.
func (n *Node) freshKey(u use, own rotation.Own) (crypto.Signer, error) {
	names, err := n.own.keys.Names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, u.prefix) {
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
		if own.Known[id] == nil && n.suits(u, key) {
			return key, nil
		}
	}
	create := n.own.keys.Create
	if u.of == statev1.KeyUse_KEY_USE_JWT && n.cfg.Keys.JWT == ca.RS256 {
		create = n.own.keys.CreateRSA
	}
	key, err := create(u.prefix + newBootID())
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

func (n *Node) makeAuthority(ctx context.Context, key crypto.Signer, u use, own rotation.Own) (*statev1.Authority, error) {
	phase := own.Phase
	if u.of != statev1.KeyUse_KEY_USE_X509 {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		now := time.Now()
		a, err := ca.NewTokenAuthority(n.own.id, u.of, spki, now, phase, now)
		if err != nil {
			return nil, err
		}
		return a, n.proveKey(key, a)
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

// proveKey has a token key sign that it belongs to this domain, so that no other domain's
// bundle takes it away (see package domain, ownership.go).
func (n *Node) proveKey(key crypto.Signer, a *statev1.Authority) error {
	var proves bool
	n.Read(func(st *domain.State) { proves = st.ProvesKeys() })
	if !proves {
		return nil
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(ca.KeyProof(n.td.Name(), alg, a.GetUse(), a.GetId()))
	proof, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err == nil && alg == ca.ES256 {
		proof, err = ca.FixedSignature(proof)
	}
	if err != nil {
		return fmt.Errorf("sign the proof of a token key: %w", err)
	}
	a.Proof = proof
	return nil
}

// signAuthority makes the authority this node's own word.
func (n *Node) signAuthority(authority *statev1.Authority) (*statev1.PrepareAuthority, error) {
	var sum [sha256.Size]byte
	n.Read(func(st *domain.State) { sum = ca.AuthorityStatement(st.Cluster(), authority) })
	spki, signature, err := n.signStatement(sum)
	if err != nil {
		return nil, fmt.Errorf("sign the authority with the node key: %w", err)
	}
	return &statev1.PrepareAuthority{Authority: authority, NodeKey: spki, Signature: signature}, nil
}

// signStatement signs with the node key, in the form that Apply verifies.
func (n *Node) signStatement(sum [sha256.Size]byte) (spki, signature []byte, err error) {
	if spki, err = x509.MarshalPKIXPublicKey(n.own.key.Public()); err != nil {
		return nil, nil, err
	}
	if signature, err = n.own.key.Sign(rand.Reader, sum[:], crypto.SHA256); err != nil {
		return nil, nil, err
	}
	signature, err = ca.FixedSignature(signature)
	return spki, signature, err
}

// dropKeys deletes the keys of authorities that will never sign again.
func (n *Node) dropKeys(u use, own rotation.Own) error {
	var over bool
	for id, a := range own.Known {
		if a != own.Active && a != own.Prepared && n.signer.Has(id) {
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
		if !strings.HasPrefix(name, u.prefix) {
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
		if a := own.Known[id]; a != nil && a != own.Active && a != own.Prepared {
			if err := n.own.keys.Delete(name); err != nil {
				return err
			}
			n.signer.Remove(id)
			n.log.Info("the key of an authority that signs no more was deleted", "authority", id, "phase", ca.PhaseName(a.GetPhase()))
		}
	}
	return nil
}
