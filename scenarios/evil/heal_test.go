package evil_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/compare"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/scenarios/evil"
)

// withinPromise is how long a lie may be believed by who reaches two honest nodes.
const withinPromise = 25 * time.Second

// follower is an agent's client that follows Sync.
type follower struct {
	*client.Client
	t *testing.T
}

type oneSVID struct{ svid *x509svid.SVID }

func (s oneSVID) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }

func members(c *catest.CA) (list []*statev1.Member) {
	for _, m := range c.Status().GetMembers() {
		list = append(list, m.GetMember())
	}
	return list
}

// follow has an agent that was admitted at c follow the node at, which is in a datacenter
// of that name alone.
func follow(t *testing.T, c, at *catest.CA, name, datacenter string) *follower {
	t.Helper()
	b := believe(t, c, name)
	leaf, err := x509.ParseCertificate(b.identity.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		t.Fatal(err)
	}
	svid := &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: b.identity.PrivateKey.(crypto.Signer)}
	key := c.Status().GetCluster().GetRecoveryKey()
	f := &follower{t: t}
	f.await("the node has heard of the agent", 10*time.Second, func() (err error) {
		at.Node().Read(func(st *domain.State) {
			if _, ok := st.Agent(name); !ok {
				err = errors.New("not yet")
			}
		})
		return err
	})
	f.Client, err = client.New(client.Config{
		TrustDomain: c.TrustDomain(), Members: members(c), Addresses: c.Addresses(), RecoveryKey: key, SVID: oneSVID{svid}, Datacenter: datacenter, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Sync(ctx, func(*client.View) error { return nil })
	}()
	t.Cleanup(func() { cancel(); <-done })
	return f
}

// knows is nil when the follower's view has the domain's member table and none of the
// attacker's authorities.
func (f *follower) knows(c *catest.CA, m *evil.Member, members int) error {
	v := f.View()
	own, _, err := bundle.Parse(c.TrustDomain(), v.Bundles[c.TrustDomain().Name()])
	if err != nil {
		return err
	}
	for _, root := range own.X509 {
		if root.Equal(m.Root.Cert) {
			return fmt.Errorf("the attacker's root is in the bundle, at revision %s", ca.Revision(v.Revision))
		}
	}
	if len(v.Members) != members {
		return fmt.Errorf("it knows %d CA nodes, not %d", len(v.Members), members)
	}
	return nil
}

func (f *follower) await(what string, within time.Duration, right func() error) time.Duration {
	f.t.Helper()
	began := time.Now()
	for {
		err := right()
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > within {
			f.t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// long skips a test that waits for the patience of subscribers where time is short: with the
// race detector, after the whole run without it.
func long(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
}

// Whom one CA node captured, with a root, a revision and a member table of its own, is free
// within 25 s without a restart, avoids that node and says so at an honest one. Who asks an
// honest node stays there.
func TestCapturedSubscriberHeals(t *testing.T) {
	t.Parallel()
	long(t)
	one := catest.Start(t, catest.Options{})
	liar := one.Join("ca-2", "dc2")
	three := one.Join("ca-3", "dc1")
	m := evil.Take(t, liar)
	captured, honest := follow(t, one, liar, "h1", "dc2"), follow(t, one, one, "h2", "dc1")
	for _, f := range []*follower{captured, honest} {
		f.await("control: the truth is known", 20*time.Second, func() error { return f.knows(one, m, 3) })
	}
	captured.await("it compares", 20*time.Second, func() error {
		if is := captured.Comparison(); is.Node != "ca-2" || len(is.Heard) != 2 {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
	m.Tell(evil.OwnRoot(), evil.Ahead(evil.FarAhead), evil.Alone())
	captured.await("control: the lie is believed", 10*time.Second, func() error {
		if err := captured.knows(one, m, 3); err == nil {
			return fmt.Errorf("not yet: %v", captured.View().Revision)
		}
		return nil
	})
	took := captured.await("the lie is left", withinPromise, func() error { return captured.knows(one, m, 3) })
	t.Logf("healed %v after it was captured", took.Round(time.Millisecond))
	is := captured.Comparison()
	if is.Moves != 1 || len(is.Avoided) != 1 || is.Avoided[0].Name != "ca-2" || len(is.Avoided[0].By) != 2 {
		t.Errorf("comparing came to %+v", is)
	}
	captured.await("an honest node says so", 10*time.Second, func() error {
		said := append(one.Status().GetContradicted(), three.Status().GetContradicted()...)
		for _, c := range said {
			if c.GetNode() == "ca-2" && c.GetCount() == 1 && slices.Equal(c.GetSubscribers(), []string{"agent h1"}) {
				return nil
			}
		}
		return fmt.Errorf("%v", said)
	})
	if is := honest.Comparison(); is.Moves != 0 || len(is.Avoided) != 0 {
		t.Errorf("who asks an honest node: %+v", is)
	}
}

// Whom a node told a revision and a member table of its own, and which then is silent, is
// free all the same: the others are asked without a session, and accepted.
func TestAbandonedSubscriberHeals(t *testing.T) {
	t.Parallel()
	long(t)
	one := catest.Start(t, catest.Options{})
	liar := one.Join("ca-2", "dc2")
	one.Join("ca-3", "dc1")
	m := evil.Take(t, liar)
	f := follow(t, one, liar, "h1", "dc2")
	f.await("control: the truth is known, and compared", 20*time.Second, func() error {
		if is := f.Comparison(); is.Node != "ca-2" || len(is.Heard) != 2 {
			return fmt.Errorf("%+v", is)
		}
		return f.knows(one, m, 3)
	})
	m.Tell(evil.OwnRoot(), evil.Ahead(evil.FarAhead), evil.Alone())
	f.await("control: the lie is believed", 10*time.Second, func() error {
		if len(f.View().Members) != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	liar.Kill()
	took := f.await("the lie is left", withinPromise, func() error { return f.knows(one, m, 3) })
	t.Logf("healed %v after the node was killed", took.Round(time.Millisecond))
	if is := f.Comparison(); is.Moves != 1 || len(is.Avoided) != 1 || is.Avoided[0].Name != "ca-2" {
		t.Errorf("comparing came to %+v", is)
	}
}

// What a node made up, of what is not compared either, goes when its subscribers go to
// another one.
func TestMadeUpEntryGoesWithItsNode(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	liar := one.Join("ca-2", "dc2")
	one.Join("ca-3", "dc1")
	m := evil.Take(t, liar)
	f := follow(t, one, liar, "h1", "dc2")
	made := &statev1.Entry{Id: "made-up"}
	believes := func() bool {
		return slices.ContainsFunc(f.View().Entries, func(e *statev1.Entry) bool { return e.GetId() == made.GetId() })
	}
	f.await("control: the truth is known", 20*time.Second, func() error { return f.knows(one, m, 3) })
	m.Tell(evil.MadeUpEntry(made))
	f.await("control: the lie is believed", 10*time.Second, func() error {
		if !believes() {
			return errors.New("not yet")
		}
		return nil
	})
	liar.Kill()
	f.await("the lie is gone", 5*time.Second, func() error {
		if believes() {
			return fmt.Errorf("it is believed at revision %s", ca.Revision(f.View().Revision))
		}
		return nil
	})
	if is := f.Comparison(); is.Moves != 0 {
		t.Errorf("comparing came to %+v", is)
	}
}

// A node that hides revocations, and what the others state, is left just the same; it is
// asked past it.
func TestHiddenRevocationIsFound(t *testing.T) {
	t.Parallel()
	long(t)
	for _, hide := range []evil.Lie{evil.HiddenRevocations(), evil.OtherItems()} {
		t.Run(hide.Name, func(t *testing.T) {
			t.Parallel()
			findsHidden(t, hide)
		})
	}
}

func findsHidden(t *testing.T, hide evil.Lie) {
	one := catest.Start(t, catest.Options{})
	one.Apply(service("accounts", 1000))
	liar := one.Join("ca-2", "dc2")
	one.Join("ca-3", "dc1")
	m := evil.Take(t, liar)
	f := follow(t, one, liar, "h1", "dc2")
	f.await("control: it follows the liar", 20*time.Second, func() error {
		if is := f.Comparison(); is.Node != "ca-2" {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
	silent := evil.Lie{Name: "no-statements", Attacks: "subscribers hear what other nodes state",
		Sync: func(*evil.Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if beat := r.GetHeartbeat(); beat != nil {
					beat.Statements = nil
				}
				return []*ententev1.SyncResponse{r}
			}
		}}
	m.Tell(hide, silent)
	believe(t, one, "h9")
	known := func() error {
		if f.View().Distrust.CheckOrigin(ca.Origin{Agent: "h9", AgentGeneration: 1}) == nil {
			return fmt.Errorf("at revision %s: %+v", ca.Revision(f.View().Revision), f.Comparison())
		}
		return nil
	}
	if _, err := one.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h9"}); err != nil {
		t.Fatal(err)
	}
	agreed := time.Now()
	time.Sleep(2 * time.Second)
	if known() == nil {
		t.Fatal("control: the revocation is not hidden")
	}
	f.await("the revocation is known", time.Until(agreed.Add(withinPromise)), known)
	took := time.Since(agreed)
	t.Logf("known %v after it was agreed", took.Round(time.Millisecond))
}

// A CA node that goes on in an epoch that a recovery has ended is left, though it passes on
// what the others state: the proof of the new epoch is asked for.
func TestHiddenRecoveryIsFound(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	late := one.Join("ca-2", "dc2")
	three := one.Join("ca-3", "dc1")
	evil.Take(t, late).Tell(evil.OldEpoch())
	f := follow(t, one, late, "h1", "dc2")
	f.await("control: it follows the node that will be late", 20*time.Second, func() error {
		if is := f.Comparison(); is.Node != "ca-2" || len(is.Heard) != 2 {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
	three.Stop()
	one.Stop()
	if _, err := node.Recover(one.Config(), one.RecoveryKey(), false); err != nil {
		t.Fatal(err)
	}
	one.Restart()
	one.WaitReady()
	ended := time.Now()
	f.await("the new epoch is known", withinPromise, func() error {
		if epoch := f.View().Cluster.GetEpoch(); epoch != 1 || len(f.View().Members) != 1 {
			return fmt.Errorf("epoch %d: %+v", epoch, f.Comparison())
		}
		return nil
	})
	t.Logf("known %v after the recovered node was ready", time.Since(ended).Round(time.Millisecond))
	if is := f.Comparison(); len(is.Avoided) != 1 || is.Avoided[0].Name != "ca-2" || !is.Avoided[0].Late {
		t.Errorf("comparing came to %+v", is)
	}
}

// Nobody leaves an honest node: not when the cluster grows from one to three and five,
// changes fast, loses a node for a while, or removes one.
func TestHonestNodesAreNotLeft(t *testing.T) {
	t.Parallel()
	long(t)
	one := catest.Start(t, catest.Options{})
	f := follow(t, one, one, "h1", "dc1")
	f.await("it follows", 20*time.Second, func() error {
		if f.View().Revision == 0 {
			return errors.New("nothing yet")
		}
		return nil
	})
	stop := make(chan struct{})
	changes := make(chan int)
	go func() { // objects, and entries that come and go, which makes distrust items
		n := 0
		for i := 0; ; i++ {
			select {
			case <-stop:
				changes <- n
				return
			default:
			}
			if _, err := one.TryApply(service("accounts", 1000+i%50)); err == nil {
				n++
			}
		}
	}()
	two, three := one.Join("ca-2", "dc1"), one.Join("ca-3", "dc1")
	hears := func(n int) func() error {
		return func() error {
			if is := f.Comparison(); len(is.Heard) < n {
				return fmt.Errorf("%+v", is)
			}
			return nil
		}
	}
	f.await("it hears two others", 30*time.Second, hears(2))
	two.Kill()
	time.Sleep(4 * time.Second)
	two.Restart()
	one.Join("ca-4", "dc1")
	five := one.Join("ca-5", "dc1")
	f.await("it hears four others", 30*time.Second, hears(4))
	if got := len(f.Confirmed()); got != 5 {
		t.Errorf("%d CA nodes are confirmed, not 5", got)
	}
	time.Sleep(compare.Patience + 3*time.Second)
	close(stop)
	t.Logf("%d changes", <-changes)
	for _, c := range []*catest.CA{one, three, five} {
		if said := c.Status().GetContradicted(); len(said) > 0 {
			t.Errorf("contradicted: %v", said)
		}
	}
	if is := f.Comparison(); is.Moves != 0 || len(is.Avoided) != 0 || is.Doubt != "" {
		t.Errorf("comparing came to %+v", is)
	}
}

// Of two CA nodes that contradict each other neither can be believed more: the subscriber
// stays, denies what either denies, and says so.
func TestTwoNodesThatContradict(t *testing.T) {
	t.Parallel()
	long(t)
	one := catest.Start(t, catest.Options{})
	liar := one.Join("ca-2", "dc2")
	m := evil.Take(t, liar)
	f := follow(t, one, liar, "h1", "dc2")
	f.await("control: the truth is known, and the other node heard", 30*time.Second, func() error {
		if is := f.Comparison(); is.Node != "ca-2" || len(is.Heard) != 1 || is.Doubt != "" {
			return fmt.Errorf("%+v", is)
		}
		return f.knows(one, m, 2)
	})
	forged := append(m.Root.Issue("/anybody").Certificates, m.Root.Cert)
	m.Tell(evil.OwnRoot())
	f.await("control: the lie is believed", 10*time.Second, func() error {
		if f.knows(one, m, 2) == nil || f.View().Distrust.Check(forged) != nil {
			return errors.New("not yet")
		}
		return nil
	})
	f.await("what the other does not hold is denied", withinPromise+8*time.Second, func() error {
		if f.View().Distrust.Check(forged) == nil {
			return fmt.Errorf("the forged SVID is accepted: %+v", f.Comparison())
		}
		return nil
	})
	if is := f.Comparison(); is.Node != "ca-2" || is.Moves != 0 || is.DoubtBy != "ca-1" {
		t.Errorf("comparing came to %+v", is)
	}
}
