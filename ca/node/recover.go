package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/replica"
)

// Contents says what a state holds: that of a snapshot, or of a stopped node.
type Contents struct {
	TrustDomain string    `json:"trustDomain"`
	ClusterID   string    `json:"clusterId"`
	Epoch       uint32    `json:"epoch"`
	RecoveryID  string    `json:"recoveryId,omitempty"`
	Recoverable bool      `json:"recoverable"` // it was made with a recovery key
	Revision    string    `json:"revision"`
	Index       uint64    `json:"index"` // of the log
	Time        time.Time `json:"time"`  // the agreed time
	Checksum    string    `json:"checksum"`

	Members     []MemberContents `json:"members"`
	Authorities map[string]int   `json:"authorities"` // by phase
	Agents      int              `json:"agents"`
	Banned      []string         `json:"banned"` // agents
	Entries     int              `json:"entries"`
	Objects     int              `json:"objects"`
	Foreign     []string         `json:"foreign"` // trust domains whose bundle it holds
}

// MemberContents is a CA node as a state names it.
type MemberContents struct {
	Name       string `json:"name"`
	ID         string `json:"id"`
	Datacenter string `json:"datacenter"`
	API        string `json:"api"`
	Voter      bool   `json:"voter"`
	Signing    bool   `json:"signing"`
}

func contents(st *domain.State) Contents {
	cluster := st.Cluster()
	c := Contents{
		TrustDomain: cluster.GetTrustDomain(),
		ClusterID:   fmt.Sprintf("%x", cluster.GetId()),
		Epoch:       cluster.GetEpoch(),
		RecoveryID:  fmt.Sprintf("%x", ca.RecoveryID(cluster)),
		Recoverable: len(cluster.GetRecoveryKey()) > 0,
		Revision:    ca.Revision(st.Revision()).String(),
		Index:       st.Applied(),
		Time:        st.Now(),
		Checksum:    fmt.Sprintf("%x", st.Checksum()),
		Members:     []MemberContents{},
		Authorities: map[string]int{},
		Agents:      st.AgentCount(),
		Banned:      []string{},
		Entries:     st.EntryCount(),
		Objects:     len(st.Objects()),
		Foreign:     []string{},
	}
	for _, m := range st.Members() {
		c.Members = append(c.Members, MemberContents{m.GetName(), m.GetId(), m.GetDatacenter(), m.GetApiAddress(), m.GetVoter(), m.GetSigning()})
	}
	for _, a := range st.Authorities() {
		c.Authorities[ca.PhaseName(a.GetPhase())]++
	}
	for a := range st.Agents() {
		if a.GetBanned() {
			c.Banned = append(c.Banned, a.GetName())
		}
	}
	for _, b := range st.ForeignBundles() {
		c.Foreign = append(c.Foreign, b.GetTrustDomain())
	}
	return c
}

// Inspect reads a whole snapshot and verifies all its checksums.
func Inspect(r io.Reader) (Contents, error) {
	st, err := domain.Restore(r)
	if err != nil {
		return Contents{}, err
	}
	if st.Cluster() == nil {
		return Contents{}, errors.New("inspect snapshot: it is of no cluster")
	}
	return contents(st), nil
}

// Survey is what a recovery from a stopped node would come to.
type Survey struct {
	Node        string    `json:"node"`
	TrustDomain string    `json:"trustDomain"`
	Epoch       uint32    `json:"epoch"`
	NewEpoch    uint32    `json:"newEpoch"`
	Revision    string    `json:"revision"`
	Agreed      uint64    `json:"agreed"`     // log index up to which this node knows that all of it was agreed
	Log         LogEnd    `json:"log"`        // where this node's log ends
	AgreedTime  time.Time `json:"agreedTime"` // what was agreed later may be lost
	Absent      []string  `json:"absent"`     // members that do not come along
}

// LogEnd is a place in the log. Of two survivors, the one with the later end loses less.
type LogEnd struct {
	Term  uint64 `json:"term"`
	Index uint64 `json:"index"`
}

func (e LogEnd) String() string { return fmt.Sprintf("%d.%d", e.Term, e.Index) }

func survey(cfg *Config, own *identity, s replica.Survey) Survey {
	out := Survey{
		Node: cfg.Name, TrustDomain: s.Cluster.GetTrustDomain(),
		Epoch: s.Cluster.GetEpoch(), NewEpoch: s.Cluster.GetEpoch() + 1,
		Revision: ca.Revision(s.Revision).String(), Agreed: s.Agreed,
		Log: LogEnd{s.Term, s.Last}, AgreedTime: s.Time, Absent: []string{},
	}
	for _, m := range s.Members {
		if m.GetId() != own.id {
			out.Absent = append(out.Absent, m.GetName())
		}
	}
	return out
}

// LookBeforeRecover says what Recover would do from this stopped node, and changes nothing.
func LookBeforeRecover(cfg *Config) (Survey, error) {
	own, err := stopped(cfg)
	if err != nil {
		return Survey{}, err
	}
	s, err := replica.Look(cfg.replica(own))
	if err != nil {
		return Survey{}, err
	}
	return survey(cfg, own, s), nil
}

func stopped(cfg *Config) (*identity, error) {
	if err := cfg.Complete(); err != nil {
		return nil, err
	}
	return openIdentity(cfg, false)
}

// Recover makes this stopped node the only member of its cluster, in a new epoch. All
// others are left behind for good: their authorities are tainted, and they have to be
// wiped and to join anew. What they agreed to without this node is lost. With setTime the
// agreed time becomes this host's, also if it was later.
func Recover(cfg *Config, recoveryKey string, setTime bool) (Survey, error) {
	own, err := stopped(cfg)
	if err != nil {
		return Survey{}, err
	}
	key, err := ca.ParseRecoveryKey(recoveryKey)
	if err != nil {
		return Survey{}, err
	}
	s, err := replica.Recover(cfg.replica(own), func(s replica.Survey) (*statev1.Recovery, *statev1.Member, error) {
		if s.Cluster.GetTrustDomain() != cfg.trustDomain().Name() {
			return nil, nil, fmt.Errorf("%s holds a CA node of %s, the configuration says %s", cfg.DataDir, s.Cluster.GetTrustDomain(), cfg.TrustDomain)
		}
		if err := checkTime(s.Time, setTime); err != nil {
			return nil, nil, err
		}
		recovery, err := begin(key, s.Cluster, s.Cluster.GetEpoch()+1, own.id, setTime)
		return recovery, cfg.firstMember(own), err
	})
	if err != nil {
		return Survey{}, err
	}
	return survey(cfg, own, s), nil
}

// checkTime rejects an agreed time that is far ahead of this host's clock: it never goes
// back otherwise, so nodes whose clock is right could not follow this one.
func checkTime(agreed time.Time, setTime bool) error {
	if ahead := time.Until(agreed); ahead > replica.MaxTimeAhead && !setTime {
		return fmt.Errorf("the agreed time is %s, %v ahead of this host's clock: if the clock is right, set the agreed time to it with --set-time", agreed.UTC().Format(time.RFC3339), ahead.Round(time.Second))
	}
	return nil
}

// begin has the recovery key say that node goes on in a new epoch.
func begin(key *ca.RecoveryKey, cluster *statev1.Cluster, epoch uint32, node string, setTime bool) (*statev1.Recovery, error) {
	if err := key.Fits(cluster); err != nil {
		return nil, err
	}
	id := make([]byte, ca.RecoveryIDSize)
	rand.Read(id)
	return key.Sign(&statev1.RecoveryStatement{
		ClusterId: cluster.GetId(), Epoch: epoch, RecoveryId: id, MemberId: node, UnixSeconds: time.Now().Unix(), SetTime: setTime,
	})
}

// Restore makes this node, whose DataDir holds no state, the only member of a cluster
// with the state of a snapshot, in a new epoch: the one after the snapshot's, or epoch
// if that is later. Keys that lie in DataDir are used: if they are those of a member
// in the snapshot, agents go on trusting it. bans are files in which nodes remember whom
// they shut out, also after the backup: beside that of DataDir.
func Restore(cfg *Config, snapshot io.Reader, recoveryKey string, epoch uint32, setTime bool, bans ...string) (Contents, error) {
	fail := func(err error) (Contents, error) {
		return Contents{}, fmt.Errorf("restore the CA of %s: %w", cfg.TrustDomain, err)
	}
	if err := cfg.Complete(); err != nil {
		return fail(err)
	}
	if replica.Exists(cfg.DataDir) {
		return fail(fmt.Errorf("%s: %w; a snapshot is restored into an empty data directory", cfg.DataDir, replica.ErrStateExists))
	}
	key, err := ca.ParseRecoveryKey(recoveryKey)
	if err != nil {
		return fail(err)
	}
	state, err := domain.Restore(snapshot)
	if err != nil {
		return fail(err)
	}
	cluster := state.Cluster()
	switch {
	case cluster.GetTrustDomain() != cfg.trustDomain().Name():
		return fail(fmt.Errorf("the snapshot is of %q", cluster.GetTrustDomain()))
	case cluster.GetDev() != cfg.Keys.InsecureDev:
		return fail(fmt.Errorf("the snapshot's cluster is for development: %v, this node's keys.insecureDev: %v; they must agree", cluster.GetDev(), cfg.Keys.InsecureDev))
	}
	if err := key.Fits(cluster); err != nil {
		return fail(err)
	}
	if err := checkTime(state.Now(), setTime); err != nil {
		return fail(err)
	}
	own, err := openIdentity(cfg, true)
	if err != nil {
		return fail(err)
	}
	recovery, err := begin(key, cluster, max(epoch, cluster.GetEpoch()+1), own.id, setTime)
	if err != nil {
		return fail(err)
	}
	if err := importBans(cfg.DataDir, bans); err != nil {
		return fail(err)
	}
	if err := replica.Restore(cfg.replica(own), state, cfg.firstMember(own), recovery); err != nil {
		return fail(err)
	}
	return contents(state), nil
}
