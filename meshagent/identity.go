package meshagent

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

// credentials are what the agent shows to be admitted, and by which it knows its CA. Immutable
// but for the memory.
type credentials struct {
	cfg    *Config
	id     spiffeid.ID // of the agent
	key    crypto.Signer
	token  *ca.Token // nil: none was given
	memory *memory
}

// openCredentials opens the data directory and makes the agent's key when there is none.
func openCredentials(cfg *Config, log *slog.Logger) (*credentials, error) {
	id, err := ca.ID(cfg.Domain(), ca.AgentPath(cfg.Name))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w", err)
	}
	c := &credentials{cfg: cfg, id: id}
	if c.memory, err = openMemory(cfg.DataDir, log); err != nil {
		return nil, err
	}
	if c.key, err = nodeattest.LoadKey(keyPath(cfg.DataDir)); err != nil {
		return nil, err
	}
	if c.token, err = nodeattest.ReadToken(cfg.CA.Token.Reveal(), cfg.CA.TokenFile); err != nil {
		if !c.admitted() { // an agent that was admitted needs none
			return nil, err
		}
		log.Warn("the join token cannot be read; the agent attests by its key", "error", err)
	}
	if !c.admitted() && c.token == nil && !cfg.Attest.Given() {
		return nil, errors.New("this host has not attested yet and has no join token: make one with `entente token create` at the CA, and set ca.token or ca.tokenFile; or set " + nodeattest.Names())
	}
	if td := cfg.Domain(); c.token != nil && c.token.TrustDomain != td {
		return nil, fmt.Errorf("the join token is for trust domain %s, the agent's is %s", c.token.TrustDomain.Name(), td.Name())
	}
	return c, nil
}

// admitted tells whether this host ever attested.
func (c *credentials) admitted() bool { return c.memory.now().cluster != nil }

// initial is the state to begin with: the SVID and bundle of the last run, if they are still
// good, or the bundle by which the CA is known before the first attestation.
func (c *credentials) initial(log *slog.Logger) (*State, error) {
	state := &State{View: &client.View{}}
	if !c.admitted() {
		var err error
		state.Bundle, err = c.configuredBundle()
		return state, err
	}
	last := c.memory.now()
	bundle, err := readBundle(c.cfg.Domain(), last.Bundle)
	if err != nil {
		log.Warn("cannot take up what the agent last knew", "error", err)
		return state, nil
	}
	state.Bundle = bundle
	if state.own, err = verifySVID(c.id, last.Certificates, c.key, bundle, time.Now()); err != nil {
		log.Info("the agent's last SVID is of no more use; it attests again by its key", "error", err)
	}
	return state, nil
}

// configuredBundle is nil when the configuration names none.
func (c *credentials) configuredBundle() (*x509bundle.Bundle, error) {
	file := c.cfg.CA.BundleFile
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read the bundle of %s: %w", c.cfg.TrustDomain, err)
	}
	bundle, err := readBundle(c.cfg.Domain(), data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return bundle, nil
}

// clientConfig is how the CA is reached without an SVID: to attest.
func (c *credentials) clientConfig(bundles x509bundle.Source, log *slog.Logger) client.Config {
	config := client.Config{
		TrustDomain: c.cfg.Domain(),
		Addresses:   c.cfg.CA.Addresses,
		Members:     c.memory.now().members,
		Confirmed:   c.confirmed(),
		Cluster:     c.cluster(),
		RecoveryKey: c.recoveryKey(),
		Bundles:     bundles,
		Datacenter:  c.cfg.Datacenter,
		Log:         log,
	}
	if c.token != nil {
		config.Addresses = append(config.Addresses[:len(config.Addresses):len(config.Addresses)], c.token.Addresses...)
		config.Pins = c.token.Pinned
	}
	return config
}

// cluster is the one that this host belongs to: as it is known, else as the join token
// says, else nil.
func (c *credentials) cluster() *statev1.Cluster {
	if known := c.memory.now().cluster; known != nil || c.token == nil {
		return known
	}
	return &statev1.Cluster{TrustDomain: c.token.TrustDomain.Name(), Id: c.token.ClusterID, Epoch: c.token.Epoch, RecoveryKey: c.token.RecoveryKey}
}

// confirmed is the last member table that two CA nodes agreed on. The first one is the join
// token's: with each address stands the key of the node there.
func (c *credentials) confirmed() (members []*statev1.Member) {
	if known := c.memory.now(); len(known.confirmed) > 0 || known.cluster != nil || c.token == nil || len(c.token.Addresses) != len(c.token.Pins) {
		return known.confirmed
	}
	for i, address := range c.token.Addresses {
		members = append(members, &statev1.Member{Id: c.token.Pins[i], ApiAddress: address})
	}
	return members
}

// recoveryKey is the cluster's, as far as it is known before the CA is asked: what was
// pinned before, else the configuration's, else the join token's.
func (c *credentials) recoveryKey() []byte {
	known := c.memory.now()
	switch {
	case len(known.RecoveryKey) > 0 && c.cfg.CA.RecoveryKey == "":
		return known.RecoveryKey
	case c.cfg.CA.RecoveryKey != "": // the operator's word
		key, _ := ca.ParseRecoveryPublic(c.cfg.CA.RecoveryKey) // ReadConfig has read it
		return key
	case known.cluster == nil && c.token != nil:
		return c.token.RecoveryKey
	}
	return nil
}

// attest asks to be admitted: by the key if it was admitted before, else, or when
// the CA does not know the key, by the join token or what the host has already.
func (c *credentials) attest(ctx context.Context, as client.Config, csr []byte) (*client.Attestation, error) {
	var byKey error
	if c.admitted() {
		answer, err := client.Attest(ctx, as, nodeattest.ByKey(), csr)
		if err == nil {
			return answer, nil
		}
		if c.token == nil && !c.cfg.Attest.Given() || !errors.Is(err, client.ErrDenied) {
			return nil, err
		}
		byKey = err
	}
	prove, err := c.proof()
	if err != nil {
		return nil, errors.Join(byKey, err)
	}
	answer, err := client.Attest(ctx, as, prove, csr)
	if err != nil {
		return nil, errors.Join(byKey, err)
	}
	return answer, nil
}

// proof is what a host that is not known shows.
func (c *credentials) proof() (nodeattest.Prove, error) {
	if c.token != nil {
		return nodeattest.ByToken(c.token, c.key), nil
	}
	return c.cfg.Attest.Open(c.cfg.TrustDomain, c.key)
}

// errOtherAgent: the join token, or the template over certificates, is for another name.
var errOtherAgent = errors.New("the CA admits this host as another agent")

// believe refuses an attestation as another agent or by another cluster. It returns the
// bundle of the own domain.
func (c *credentials) believe(answer *client.Attestation, recoveryKey []byte) (*x509bundle.Bundle, error) {
	bundle, err := readBundle(c.cfg.Domain(), answer.Bundle)
	if err != nil {
		return nil, err
	}
	if name := answer.Agent.GetName(); name != c.cfg.Name {
		return nil, fmt.Errorf("%[1]w: %[2]q, and this one is %[3]q: change its name, or evict %[2]q and make a token for this one, or another template (x509pop.name of the CA nodes)", errOtherAgent, name, c.cfg.Name)
	}
	cluster := c.cluster()
	if cluster != nil && !bytes.Equal(cluster.GetId(), answer.Cluster.GetId()) {
		return nil, fmt.Errorf("the CA answers as cluster %x, this host belongs to %x: to join it, delete %s and attest with a new token",
			answer.Cluster.GetId(), cluster.GetId(), c.cfg.DataDir)
	}
	if err := ca.FollowCluster(cluster, answer.Cluster, recoveryKey); err != nil {
		return nil, fmt.Errorf("the CA node that answers is not believed: %w", err)
	}
	return bundle, nil
}

// ownIdentity keeps the agent's own SVID. Its fields do not change; the SVID is in the store.
type ownIdentity struct {
	*credentials
	log      *slog.Logger
	now      func() time.Time // time.Now, but in tests
	store    *store
	client   *client.Client // nil in tests without a CA
	signer   signer         // client, but in tests
	failures prometheus.Counter
}

// run attests when there is no SVID, renews it at half-life, and attests again when it has
// ended or the CA does not know it any more. It closes identified when there is one. Only
// the refusal of a join token ends it.
func (i *ownIdentity) run(ctx context.Context, identified chan<- struct{}) error {
	now := i.now()
	due, failures := now, 0
	if own := i.store.State().own; own != nil {
		due = halfLife(own, now)
		close(identified)
		identified = nil
	}
	for {
		if err := i.wait(ctx, due, failures == 0); err != nil {
			return err
		}
		before := i.store.State().own
		svid, err := i.renew(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		now = i.now()
		if err == nil {
			due, failures = halfLife(svid, now), 0
			if before != nil && i.client != nil {
				i.client.Renewed()
			}
			if identified != nil {
				close(identified)
				identified = nil
			}
			continue
		}
		if !i.admitted() && (errors.Is(err, client.ErrDenied) || errors.Is(err, errOtherAgent)) {
			return fmt.Errorf("this host was not admitted: %w", err)
		}
		failures++
		i.failures.Inc()
		var left time.Duration
		if own := i.store.State().own; own != nil {
			left = own.Certificates[0].NotAfter.Sub(now)
		}
		if failures == 1 {
			i.log.Warn("no fresh SVID for the agent itself; trying again", "valid_for", max(left, 0).Round(time.Second), "error", err)
		}
		due = now.Add(pauseAfter(err, failures, left))
	}
}

// lookRefused is how often the agent looks whether CA nodes will not have its SVID.
const lookRefused = time.Second

// wait waits until the agent's own SVID is to be renewed: when it is due, and, with early,
// when its authority was tainted or CA nodes refuse it.
func (i *ownIdentity) wait(ctx context.Context, due time.Time, early bool) error {
	timer := time.NewTimer(due.Sub(i.now()))
	defer timer.Stop()
	clock := newClock(i.now)
	look := time.NewTicker(lookRefused)
	defer look.Stop()
	scheduled := false // for a taint
	for {
		state := i.store.State()
		if early && state.own != nil && i.void(state) {
			return nil
		}
		if early && !scheduled && state.tainted(state.own) {
			scheduled = true
			if pause := spread(state.View.ReissueWithin); pause < due.Sub(i.now()) {
				timer.Reset(pause)
			}
		}
		changed := state.Changed()
		if !early || scheduled {
			changed = nil
		}
		select {
		case <-timer.C:
			return nil
		case <-changed:
		case <-look.C:
			if early && i.refused() {
				return nil
			}
			if clock.set() != 0 && state.own != nil {
				now := i.now()
				timer.Reset(halfLife(state.own, now).Sub(now))
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// refused tells whether CA nodes will not have the agent's SVID.
func (i *ownIdentity) refused() bool { return i.client != nil && i.client.Refused() }

// void tells whether nobody accepts the agent's own SVID any more: its authority is out
// of the bundle, or it has ended.
func (i *ownIdentity) void(state *State) bool {
	if state.own == nil || state.Bundle == nil {
		return true
	}
	_, err := peer.Verify(state.own.Certificates, state.Bundle, i.now())
	return err != nil
}

// renew gets one SVID for the agent and puts it into the state.
func (i *ownIdentity) renew(ctx context.Context) (*x509svid.SVID, error) {
	csr, err := nodeattest.CSR(i.key)
	if err != nil {
		return nil, err
	}
	if !i.void(i.store.State()) && !i.refused() {
		result := i.signer.SignX509(ctx, []client.SignRequest{{CSR: csr}})[0]
		if result.Err == nil {
			return i.install(result.Certificates, nil)
		}
		if !errors.Is(result.Err, client.ErrDenied) {
			return nil, result.Err
		}
		i.log.Warn("the CA does not renew the agent's SVID; attesting again", "error", result.Err)
	}
	answer, err := i.attest(ctx, i.attestAs(), csr)
	if err != nil {
		return nil, err
	}
	return i.install(answer.Certificates, answer)
}

// attestAs is how the CA is reached now, by what the agent knows of it by now.
func (i *ownIdentity) attestAs() client.Config { return i.clientConfig(i.store.Bundles(), i.log) }

// install verifies a new SVID of the agent's own and takes it into use; answer is
// nil when it was renewed and not attested.
func (i *ownIdentity) install(certificates [][]byte, answer *client.Attestation) (*x509svid.SVID, error) {
	bundle := i.store.State().Bundle
	if answer != nil {
		var err error
		if bundle, err = i.believe(answer, i.client.RecoveryKey()); err != nil {
			return nil, err
		}
	}
	svid, err := verifySVID(i.id, certificates, i.key, bundle, i.now())
	if err == nil && i.store.State().tainted(svid) {
		err = errTainted
	}
	if err != nil {
		return nil, err
	}
	i.store.change(func(s *State) *State {
		next := *s
		next.own = svid
		if !next.Ready { // later the bundle of Sync is newer
			next.Bundle = bundle
		}
		return &next
	})
	i.memory.keep(func(k *known) {
		k.Certificates = certificates
		if answer != nil {
			k.Bundle, k.cluster, k.members = answer.Bundle, answer.Cluster, answer.Members
		}
	})
	if answer != nil {
		i.log.Info("attested", "spiffe_id", i.id, "valid_until", svid.Certificates[0].NotAfter)
	}
	return svid, nil
}
