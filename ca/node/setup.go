package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"os"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/peer"
)

// nodeKey is the name of the node key in the key store.
const nodeKey = "node"

// identity is what a node is to its peers: a key.
type identity struct {
	id   string // key id, which is the node id
	key  crypto.Signer
	cert tls.Certificate // self-signed, carries the key
	keys keys
}

func openIdentity(cfg *Config, create bool) (*identity, error) {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	keys, err := cfg.openKeys()
	if err != nil {
		return nil, err
	}
	load := keys.Load
	if create {
		load = keys.LoadOrCreate
	}
	key, err := load(nodeKey)
	if errors.Is(err, keystore.ErrNoKey) {
		return nil, fmt.Errorf("%s holds no CA node: run `entente ca init` or `entente ca join` first", cfg.DataDir)
	}
	if err != nil {
		return nil, err
	}
	cert, err := peer.SelfSigned(key, cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	return &identity{id: peer.KeyID(cert.Leaf), key: key, cert: cert, keys: keys}, nil
}

func (c *Config) replica(own *identity) replica.Config {
	return replica.Config{
		Dir:         c.DataDir,
		NodeID:      own.id,
		Certificate: own.cert,
		Advertise:   c.Advertise.Raft,
		Timing:      replica.Timing{Heartbeat: c.Timing.Heartbeat},
	}
}

// Init makes the node the first of a new cluster. It refuses if DataDir holds a CA
// node already. keep gets the cluster's recovery key, in its text form, before the
// cluster exists: whoever calls must put it where the operators will find it, and not
// on this host. It is nowhere else.
func Init(cfg *Config, keep func(recoveryKey string) error) error {
	fail := func(err error) error { return fmt.Errorf("initialise the CA of %s: %w", cfg.TrustDomain, err) }
	if err := cfg.Complete(); err != nil {
		return fail(err)
	}
	if replica.Exists(cfg.DataDir) {
		return fail(fmt.Errorf("%s: %w; to start it: entente ca run", cfg.DataDir, replica.ErrStateExists))
	}
	if err := cfg.checkUpstream(ca.LifetimesOf(cfg.Lifetimes.record()).Phase); err != nil {
		return fail(err)
	}
	own, err := openIdentity(cfg, true)
	if err != nil {
		return fail(err)
	}
	id := make([]byte, ca.ClusterIDSize)
	rand.Read(id)
	recovery := &ca.RecoveryKey{TrustDomain: cfg.trustDomain(), ClusterID: id, Seed: make([]byte, 32)}
	rand.Read(recovery.Seed)
	text, err := recovery.Text()
	if err != nil {
		return fail(err)
	}
	if err := keep(text); err != nil {
		return fail(fmt.Errorf("keep the recovery key: %w", err))
	}
	err = replica.Bootstrap(cfg.replica(own), &statev1.Command{
		Actor: "operator", ActorKind: statev1.ActorKind_ACTOR_KIND_OPERATOR,
		Body: &statev1.Command_Init{Init: &statev1.Init{
			Cluster: &statev1.Cluster{
				TrustDomain: cfg.trustDomain().Name(),
				Id:          id,
				Dev:         cfg.Keys.InsecureDev,
				Lifetimes:   cfg.Lifetimes.record(),
				RecoveryKey: recovery.PublicKey(),
				MinVoters:   uint32(cfg.MinVoters),
			},
			Member: cfg.firstMember(own),
		}},
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// firstMember is this node as a cluster's only member.
func (c *Config) firstMember(own *identity) *statev1.Member {
	return &statev1.Member{
		Id: own.id, Name: c.Name, Datacenter: c.Datacenter,
		RaftAddress: c.Advertise.Raft, ApiAddress: c.Advertise.API,
		Voter: true, Signing: true, FeatureLevel: c.level(),
	}
}

// level is which commands this node says that it carries out.
func (c *Config) level() uint32 {
	if c.pretendLevel != 0 {
		return c.pretendLevel
	}
	return domain.FeatureLevel
}

// Join has the node admitted to a running cluster by a one-time token. It may be
// repeated with the same token until the node has run.
func Join(ctx context.Context, cfg *Config, tokenText string) error {
	fail := func(err error) error { return fmt.Errorf("join the CA of %s: %w", cfg.TrustDomain, err) }
	if err := cfg.Complete(); err != nil {
		return fail(err)
	}
	token, err := ca.ParseToken(tokenText)
	if err != nil {
		return fail(err)
	}
	switch {
	case token.Role != ca.RoleNode:
		return fail(errors.New("this is an agent's join token; make one with: entente token create --node NAME"))
	case token.TrustDomain != cfg.trustDomain():
		return fail(fmt.Errorf("the token is for %s", token.TrustDomain.Name()))
	}
	own, err := openIdentity(cfg, true)
	if err != nil {
		return fail(err)
	}
	result, err := server.Join(ctx, server.JoinRequest{
		Token: token, Certificate: own.cert,
		RaftAddress: cfg.Advertise.Raft, APIAddress: cfg.Advertise.API, Level: cfg.level(),
	})
	if err != nil {
		return fail(err)
	}
	switch {
	case result.Member.GetName() != cfg.Name || result.Member.GetDatacenter() != cfg.Datacenter:
		return fail(fmt.Errorf("the token admitted this node as %[1]s in datacenter %[2]s, the configuration says %[3]s in %[4]s: correct it and repeat with the same token; if this is the wrong host: entente node remove %[1]s, delete %[5]s here, and make another token",
			result.Member.GetName(), result.Member.GetDatacenter(), cfg.Name, cfg.Datacenter, cfg.DataDir))
	case result.Cluster.GetDev() != cfg.Keys.InsecureDev:
		return fail(fmt.Errorf("the cluster is for development: %v, this node's keys.insecureDev: %v; they must agree", result.Cluster.GetDev(), cfg.Keys.InsecureDev))
	}
	if err := cfg.checkUpstream(ca.LifetimesOf(result.Cluster.GetLifetimes()).Phase); err != nil {
		return fail(fmt.Errorf("%w; the node is a member already: correct it and repeat with the same token", err))
	}
	if err := replica.PrepareJoin(cfg.replica(own), result.Cluster, result.Members); err != nil {
		return fail(err)
	}
	return nil
}
