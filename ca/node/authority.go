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
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/rotation"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/internal/daemon"
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

// authorities are this node's own, of each use: their keys, their phases, and the root that
// certifies them.
type authorities struct {
	*proposals
	signer   *signer.Signer
	upstream upstream // nil: they sign themselves

	upstreamFiles *daemon.Followed[struct{}] // whether certificate and key of the upstream belong together
	preparing     sync.Mutex                 // one at a time
}

// load gives the signer every authority key in the store.
func (as *authorities) load() error {
	names, err := as.own.keys.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.ContainsFunc(uses, func(u use) bool { return strings.HasPrefix(name, u.prefix) }) {
			continue
		}
		key, err := as.own.keys.Load(name)
		if err != nil {
			return err
		}
		if _, err := as.signer.Add(key); err != nil {
			return err
		}
	}
	return nil
}

// run takes this node's authorities of each use through their phases: always
// one PREPARED and one ACTIVE. Each step is agreed before it is used; the key is on the disk
// before it is proposed.
func (as *authorities) run(ctx context.Context) error {
	failed := ""
	for {
		changed := as.applied.wait()
		if err := as.step(ctx); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != failed {
				failed = text
				as.log.Warn("this node's authorities cannot move on; trying again", "error", err)
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

func (as *authorities) ownAuthorities(u use) (own rotation.Own) {
	as.Read(func(st *domain.State) { own = rotation.OwnOf(st, as.own.id, u.of) })
	return own
}

func (as *authorities) step(ctx context.Context) error {
	member := as.ownAuthorities(uses[0]).Member
	if member == nil {
		return nil // not admitted as far as this state knows
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if member.GetRaftAddress() != as.cfg.Advertise.Raft || member.GetApiAddress() != as.cfg.Advertise.API || member.GetFeatureLevel() != as.cfg.level() {
		if err := as.moveMember(ctx); err != nil {
			return err
		}
	}
	if !member.GetSigning() {
		return nil // a witness
	}
	// All of them also when one fails: X.509 does not wait for tokens.
	var errs []error
	for _, u := range uses {
		errs = append(errs, as.stepAuthority(ctx, u, as.ownAuthorities(u)))
	}
	return errors.Join(errs...)
}

func (as *authorities) stepAuthority(ctx context.Context, u use, own rotation.Own) error {
	if err := as.reconcile(ctx, own, u); err != nil {
		return err
	}
	switch {
	case own.Prepared == nil:
		_, err := as.prepareAuthority(ctx, u)
		return err
	case !as.signer.Has(own.Prepared.GetId()):
		// A node that was restored without its keys: it can never use it.
		as.log.Error("the key of this node's PREPARED authority is lost: giving it up for another one", "authority", own.Prepared.GetId(), "use", u.name)
		return as.agreeSelf(ctx, &statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: own.Prepared.GetId()}}})
	case own.Prepared.GetReady() && !as.local.view().Took(own.Prepared.GetId()) && as.due(u, own):
		if !as.noQuorumSince(time.Now()).IsZero() {
			return as.ActivateOffline(own.Prepared.GetId(), "CA node "+as.cfg.Name)
		}
		return as.activate(ctx, u, own.Prepared)
	}
	return as.dropKeys(u, own)
}

// due: by schedule the PREPARED authority is to be used. With quorum the agreed time
// counts, so that no clock alone moves anything; without, this node's own.
func (as *authorities) due(u use, own rotation.Own) bool {
	now := own.Agreed
	if !as.noQuorumSince(time.Now()).IsZero() {
		now = as.wall()
	}
	var longest time.Duration
	as.Read(func(st *domain.State) { longest = rotation.LongestOf(st)[u.of] })
	return own.Due(now, longest)
}

// coming is closed with the next change of the state if run is about to activate
// the PREPARED authority, there being no other; nil: it is not.
func (as *authorities) coming(of statev1.KeyUse) <-chan struct{} {
	i := slices.IndexFunc(uses, func(u use) bool { return u.of == of })
	if i < 0 || as.replica.Load() == nil {
		return nil
	}
	changed := as.applied.wait()
	own := as.ownAuthorities(uses[i])
	if own.Active != nil || !own.Prepared.GetReady() || !as.signer.Has(own.Prepared.GetId()) || !as.due(uses[i], own) {
		return nil
	}
	return changed
}

func (as *authorities) activate(ctx context.Context, u use, a *statev1.Authority) error {
	err := as.agreeSelf(ctx, &statev1.Command{
		Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: a.GetId()}},
	})
	if err != nil {
		return fmt.Errorf("activate %s authority %.12s: %w", u.name, a.GetId(), err)
	}
	as.log.Info("authority signs from now on", "authority", a.GetId(), "use", u.name)
	return nil
}

// moveMember tells everybody where this node is reached now, and what it carries out.
func (as *authorities) moveMember(ctx context.Context) error {
	outcome, err := as.Propose(ctx, as.byItself(&statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
		Id: as.own.id, RaftAddress: as.cfg.Advertise.Raft, ApiAddress: as.cfg.Advertise.API,
		FeatureLevel: as.cfg.level(),
	}}}))
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("announce this node's addresses and feature level: %w", err)
	}
	return nil
}

// Prepare prepares an authority of one use because an operator wants one.
func (as *authorities) Prepare(ctx context.Context, of statev1.KeyUse) (id string, err error) {
	i := slices.IndexFunc(uses, func(u use) bool { return u.of == of })
	if i < 0 {
		return "", fmt.Errorf("%s is no use of an authority", of)
	}
	if !as.ownAuthorities(uses[i]).Member.GetSigning() {
		return "", errors.New("this CA node does not sign")
	}
	return as.prepareAuthority(ctx, uses[i])
}

func (as *authorities) prepareAuthority(ctx context.Context, u use) (id string, err error) {
	as.preparing.Lock() // the schedule and an operator want one at the same time
	defer as.preparing.Unlock()
	own := as.ownAuthorities(u)
	if own.Prepared != nil {
		return own.Prepared.GetId(), nil
	}
	key, err := as.freshKey(u, own)
	if err != nil {
		return "", err
	}
	authority, err := as.makeAuthority(ctx, key, u, own)
	if err != nil {
		return "", err
	}
	proposal, err := as.signAuthority(authority)
	if err != nil {
		return "", err
	}
	err = as.agreeSelf(ctx, &statev1.Command{Body: &statev1.Command_PrepareAuthority{PrepareAuthority: proposal}})
	if err != nil {
		return "", fmt.Errorf("prepare %s authority %.12s: %w", u.name, authority.GetId(), err)
	}
	as.log.Info("authority is in the bundle", "authority", authority.GetId(), "use", u.name)
	return authority.GetId(), nil
}

// freshKey returns a key that was made for an authority and never became one, or a new
// one.
func (as *authorities) freshKey(u use, own rotation.Own) (crypto.Signer, error) {
	names, err := as.own.keys.Names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, u.prefix) {
			continue
		}
		key, err := as.own.keys.Load(name)
		if err != nil {
			return nil, err
		}
		id, err := as.signer.Add(key)
		if err != nil {
			return nil, err
		}
		if own.Known[id] == nil && as.suits(u, key) {
			return key, nil
		}
	}
	create := as.own.keys.Create
	if u.of == statev1.KeyUse_KEY_USE_JWT && as.cfg.Keys.JWT == ca.RS256 {
		create = as.own.keys.CreateRSA
	}
	key, err := create(u.prefix + newBootID())
	if err != nil {
		return nil, err
	}
	_, err = as.signer.Add(key)
	return key, err
}

// suits: the key was made for the algorithm that the configuration asks for now.
func (as *authorities) suits(u use, key crypto.Signer) bool {
	if u.of != statev1.KeyUse_KEY_USE_JWT {
		return true
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	return err == nil && alg == cmp.Or(as.cfg.Keys.JWT, ca.ES256)
}

func (as *authorities) makeAuthority(ctx context.Context, key crypto.Signer, u use, own rotation.Own) (*statev1.Authority, error) {
	phase := own.Phase
	if u.of != statev1.KeyUse_KEY_USE_X509 {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		now := time.Now()
		a, err := ca.NewTokenAuthority(as.own.id, u.of, spki, now, phase, now)
		if err != nil {
			return nil, err
		}
		return a, as.proveKey(key, a)
	}
	var serial [16]byte
	rand.Read(serial[:])
	now := time.Now()
	request := ca.AuthorityRequest{TrustDomain: as.td, PublicKey: key.Public(), Serial: serial, Now: now, Phase: phase}
	if as.upstream != nil {
		return as.certifiedAuthority(ctx, key, request)
	}
	template, err := ca.AuthorityTemplate(request)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the authority certificate: %w", err)
	}
	return ca.NewAuthority(as.td, as.own.id, der, nil, phase, now)
}

// proveKey has a token key sign that it belongs to this domain, so that no other domain's
// bundle takes it away (see package domain, ownership.go).
func (as *authorities) proveKey(key crypto.Signer, a *statev1.Authority) error {
	var proves bool
	as.Read(func(st *domain.State) { proves = st.ProvesKeys() })
	if !proves {
		return nil
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(ca.KeyProof(as.td.Name(), alg, a.GetUse(), a.GetId()))
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
func (as *authorities) signAuthority(authority *statev1.Authority) (*statev1.PrepareAuthority, error) {
	var sum [sha256.Size]byte
	as.Read(func(st *domain.State) { sum = ca.AuthorityStatement(st.Cluster(), authority) })
	spki, signature, err := as.SignStatement(sum)
	if err != nil {
		return nil, fmt.Errorf("sign the authority with the node key: %w", err)
	}
	return &statev1.PrepareAuthority{Authority: authority, NodeKey: spki, Signature: signature}, nil
}

// dropKeys deletes the keys of authorities that will never sign again.
func (as *authorities) dropKeys(u use, own rotation.Own) error {
	var over bool
	for id, a := range own.Known {
		if a != own.Active && a != own.Prepared && as.signer.Has(id) {
			over = true
		}
	}
	if !over {
		return nil
	}
	names, err := as.own.keys.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, u.prefix) {
			continue
		}
		key, err := as.own.keys.Load(name)
		if err != nil {
			return err
		}
		id, err := as.signer.Add(key)
		if err != nil {
			return err
		}
		if a := own.Known[id]; a != nil && a != own.Active && a != own.Prepared {
			if err := as.own.keys.Delete(name); err != nil {
				return err
			}
			as.signer.Remove(id)
			as.log.Info("the key of an authority that signs no more was deleted", "authority", id, "phase", ca.PhaseName(a.GetPhase()))
		}
	}
	return nil
}

// activeAuthority is this node's ACTIVE X.509 authority.
func (as *authorities) activeAuthority() *statev1.Authority {
	return as.activeFor(statev1.KeyUse_KEY_USE_X509)
}

// activeFor is the authority that this node signs with for one use: the ACTIVE one, or
// the one that it took into use without quorum.
func (as *authorities) activeFor(use statev1.KeyUse) (active *statev1.Authority) {
	r := as.replica.Load()
	if r == nil {
		return nil
	}
	r.Read(func(st *domain.State) { active = as.local.view().Signing(st, as.own.id, use) })
	return active
}

// autonomy is how long this node signs with the authorities that it may use without
// another agreement: the ACTIVE one, and the next if that is marked ready.
func (as *authorities) autonomy(now time.Time) time.Duration {
	own := as.ownAuthorities(uses[0]) // X.509: without it nothing else is reached
	var end int64
	if own.Active != nil {
		end = own.Active.GetNotAfter()
	}
	if own.Prepared.GetReady() {
		end = max(end, own.Prepared.GetNotAfter())
	}
	return max(time.Unix(end, 0).Sub(now), 0)
}
