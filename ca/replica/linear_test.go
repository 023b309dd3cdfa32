package replica

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/simnet"
)

// call is what one client wants of one record: an entry, whose values are all
// different, or a one-time token, whose value is the key that it admitted.
type call struct {
	kind  byte // 'p'ut, 'c'ompare and swap, 'g'et, 'r'edeem a token
	key   string
	value string // put, swap: the new one; redeem: the client's key
	old   string // swap: the value that is expected
}

// answer of a get is the value, of the others whether it was done; nil: not known.
var sequential = porcupine.Model{
	Partition: func(ops []porcupine.Operation) (parts [][]porcupine.Operation) {
		at := map[string]int{}
		for _, op := range ops {
			key := op.Input.(call).key
			i, ok := at[key]
			if !ok {
				i = len(parts)
				at[key], parts = i, append(parts, nil)
			}
			parts[i] = append(parts[i], op)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		have, c := state.(string), input.(call)
		done, known := output.(bool)
		switch c.kind {
		case 'p':
			return true, c.value
		case 'g':
			return output.(string) == have, have
		case 'c', 'r':
			fits := have == c.old || c.kind == 'r' && have == c.value // the same key may repeat
			if known && done != fits {
				return false, have
			}
			if fits {
				return true, c.value
			}
		}
		return true, have
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v: %v", input, output) },
}

// history is what clients did and saw.
type history struct {
	mu   sync.Mutex
	ops  []porcupine.Operation
	seen map[string]int
}

const inDoubt = 1000 * time.Hour // it may happen at any time, or never

func (h *history) note(client int, c call, out any, from, to time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if out == nil {
		client, to = -1-len(h.ops), from.Add(inDoubt) // a client has one call at a time
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: c, Output: out, Call: from.UnixNano(), Return: to.UnixNano()})
	h.seen[fmt.Sprintf("%c %T", c.kind, out)]++
}

// faultyWorld is a cluster in virtual time, with clients, to which things happen.
type faultyWorld struct {
	t       *testing.T
	network *simnet.Network
	random  *rand.Rand // the script's; only its goroutine uses it
	nodes   []*node
	blind   bool                 // reads go without a barrier: the control
	frozen  atomic.Pointer[node] // its disk does not answer
	mu      sync.RWMutex
	up      map[*node]*Replica
	history history
}

func newFaultyWorld(t *testing.T, seed uint64, voters int) *faultyWorld {
	w := &faultyWorld{
		t: t, random: rand.New(rand.NewPCG(seed, 7)), up: map[*node]*Replica{},
		network: simnet.New(millisecond),
		history: history{seen: map[string]int{}},
	}
	var names []string
	for i := range voters {
		names = append(names, fmt.Sprintf("ca%d", i+1))
	}
	w.nodes = clusterOf(t, inMemory(w.network, seed, &w.frozen), names...)
	for _, n := range w.nodes {
		w.up[n] = n.Replica
	}
	return w
}

// inMemory makes nodes whose network and log are in memory, for virtual time. The disk of
// the one that is frozen does not answer for three seconds.
func inMemory(network *simnet.Network, seed uint64, frozen *atomic.Pointer[node]) func(testing.TB, string) *node {
	var dice sync.Mutex
	disk := rand.New(rand.NewPCG(seed, 8))
	return func(t testing.TB, name string) *node {
		n := placeNode(t, name)
		n.network, n.address = network, name+":7000"
		n.shelf = &memoryShelf{
			latency: func() time.Duration {
				dice.Lock()
				defer dice.Unlock()
				if frozen.Load() == n {
					return 3 * time.Second
				}
				return 200*time.Microsecond + time.Duration(disk.ExpFloat64()*float64(300*time.Microsecond))
			},
			reached: func() bool {
				dice.Lock()
				defer dice.Unlock()
				return disk.IntN(2) == 0
			},
		}
		return n
	}
}

func millisecond(_, _ string) time.Duration { return time.Millisecond }

func (w *faultyWorld) at(n *node) *Replica {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.up[n]
}

func (w *faultyWorld) stop(n *node) {
	w.mu.Lock()
	w.up[n] = nil
	w.mu.Unlock()
	n.kill()
}

func (w *faultyWorld) restart(n *node) {
	n.start()
	w.mu.Lock()
	w.up[n] = n.Replica
	w.mu.Unlock()
}

// leader is who believes to lead; nil: nobody.
func (w *faultyWorld) leader() *node {
	for _, n := range w.nodes {
		if r := w.at(n); r != nil && r.IsLeader() {
			return n
		}
	}
	return nil
}

func record(key, value string) *statev1.Entry {
	return &statev1.Entry{Id: "entry/" + key, Path: "/" + key, Hosts: []string{"h"}, Selectors: []string{"unix:uid:1"}, Hint: value}
}

func entryCommand(changes ...*statev1.EntryChange) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: changes}}}
}

func createEntry(key, value string) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: record(key, value)}}
}

func updateEntry(key, value string, revision uint64) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Update{Update: record(key, value)}, IfRevision: revision}
}

// A token's seed follows from its name, so that every client can redeem it.
func seedOf(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

func publish(name string) *statev1.Command {
	c := token(name)
	c.GetCreateToken().GetToken().PublicKey = ed25519.NewKeyFromSeed(seedOf(name)).Public().(ed25519.PublicKey)
	c.GetCreateToken().GetToken().GetAgent().Name = "host-" + name
	return c
}

func redeem(t testing.TB, name, key string) *statev1.Command {
	statement, signature, err := ca.SignStatement(seedOf(name), &statev1.JoinStatement{
		ClusterId: clusterID, TokenId: name, Role: ca.RoleAgent, KeyId: key, Exporter: make([]byte, ca.ExporterSize),
	})
	if err != nil {
		t.Fatal(err)
	}
	return &statev1.Command{Body: &statev1.Command_AttestAgent{AttestAgent: &statev1.AttestAgent{
		TokenId: name, KeyId: key, Statement: statement, Signature: signature,
	}}}
}

const (
	recordsAtOnce = 12
	patience      = time.Second // of a client
)

// client calls until the time is over. Every second the records are others, so that few
// calls in doubt meet on one.
func (w *faultyWorld) client(id int, seed uint64, began time.Time, length time.Duration) {
	random := rand.New(rand.NewPCG(seed, uint64(100+id)))
	known := map[string]*statev1.Entry{} // as last read
	at := w.nodes[random.IntN(len(w.nodes))]
	for n := 0; time.Since(began) < length; n++ {
		time.Sleep(time.Duration(1+random.IntN(30)) * time.Millisecond)
		r := w.at(at)
		if r == nil {
			at = w.nodes[random.IntN(len(w.nodes))]
			continue
		}
		slot := int(time.Since(began) / time.Second)
		key := fmt.Sprintf("k%dx%d", slot, random.IntN(recordsAtOnce))
		c := call{key: key, value: fmt.Sprintf("c%dn%d", id, n)}
		var command *statev1.Command
		switch random.IntN(8) {
		case 0, 1:
			c.kind, command = 'p', entryCommand(updateEntry(key, c.value, 0))
		case 2, 3:
			if have := known[key]; have != nil {
				c.kind, c.old = 'c', have.GetHint()
				command = entryCommand(updateEntry(key, c.value, have.GetRevision()))
				break
			}
			fallthrough
		case 4, 5, 6:
			c = call{kind: 'g', key: key}
		case 7:
			c.kind, c.key = 'r', fmt.Sprintf("t%dx%d", slot, random.IntN(recordsAtOnce))
			c.value = fmt.Sprintf("%064x", sha256.Sum256([]byte(c.value)))
			command = redeem(w.t, c.key, c.value)
		}
		if err := w.call(id, r, c, command, known); err != nil {
			var elsewhere ErrNotLeader
			at = w.nodes[random.IntN(len(w.nodes))]
			if errors.As(err, &elsewhere) && random.IntN(4) > 0 {
				for _, n := range w.nodes {
					if n.id == elsewhere.LeaderID {
						at = n
					}
				}
			}
		}
	}
}

// call makes one call at one node and notes what came of it.
func (w *faultyWorld) call(id int, r *Replica, c call, command *statev1.Command, known map[string]*statev1.Entry) error {
	ctx, done := context.WithTimeout(context.Background(), patience)
	defer done()
	from := time.Now()
	if c.kind == 'g' {
		if !w.blind {
			if err := r.Barrier(ctx); err != nil {
				return err
			}
		}
		var have *statev1.Entry
		r.Read(func(s *domain.State) { have, _ = s.Entry("entry/" + c.key) })
		known[c.key] = have
		w.history.note(id, c, have.GetHint(), from, time.Now())
		return nil
	}
	outcome, err := r.Propose(ctx, command)
	switch refused := outcome.Refused; {
	case err == nil && refused == nil:
		w.history.note(id, c, true, from, time.Now())
	case err == nil && refused.Code == domain.CodeNotFound: // the record of this second is not there yet
	case err == nil && (refused.Code == domain.CodeCAS || refused.Code == domain.CodeTokenSpent):
		w.history.note(id, c, false, from, time.Now())
	case err == nil:
		w.t.Errorf("%+v: %v", c, refused)
	case errors.Is(err, ErrOutcomeUnknown), errors.Is(err, ErrStopped):
		w.history.note(id, c, nil, from, time.Now())
	case errors.As(err, new(ErrNotLeader)), errors.Is(err, ErrNoQuorum), errors.Is(err, context.DeadlineExceeded): // it was not proposed
	default:
		w.t.Errorf("%+v: %v", c, err)
	}
	return err
}

// records makes the records of all seconds beforehand.
func (w *faultyWorld) records(length time.Duration) {
	for slot := range int(length/time.Second) + 1 {
		var changes []*statev1.EntryChange
		for i := range recordsAtOnce {
			key := fmt.Sprintf("k%dx%d", slot, i)
			changes = append(changes, createEntry(key, "first"))
			w.history.ops = append(w.history.ops, porcupine.Operation{ClientId: 0, Input: call{kind: 'p', key: key, value: "first"}, Output: true})
			carryOut(w.t, w.nodes[0], publish(fmt.Sprintf("t%dx%d", slot, i)))
		}
		carryOut(w.t, w.nodes[0], entryCommand(changes...))
	}
}

// run has clients call for the given time while the nemesis does what it does.
func (w *faultyWorld) run(seed uint64, length time.Duration, nemesis func()) {
	w.records(length)
	began := time.Now()
	var clients sync.WaitGroup
	for id := range 6 {
		clients.Go(func() { w.client(id+1, seed, began, length) })
	}
	for time.Since(began) < length-2*time.Second {
		nemesis()
		w.network.MendAll()
		for _, n := range w.nodes {
			if w.at(n) == nil {
				w.restart(n)
			}
		}
		time.Sleep(time.Duration(300+w.random.IntN(900)) * time.Millisecond)
	}
	clients.Wait()
	// All agree in the end, and have what was acknowledged.
	leader := leaderOf(w.t, w.nodes[0])
	carryOut(w.t, w.nodes[0], token("end"))
	known := map[string]*statev1.Entry{}
	for slot := range int(length / time.Second) {
		for i := range recordsAtOnce {
			if err := w.call(0, leader.Replica, call{kind: 'g', key: fmt.Sprintf("k%dx%d", slot, i)}, nil, known); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	alike(w.t, w.nodes...)
}

// between is a time from a to b milliseconds.
func (w *faultyWorld) between(a, b int) time.Duration {
	return time.Duration(a+w.random.IntN(b-a)) * time.Millisecond
}

// separate cuts all connections, both ways, between nodes that no group has both of.
func (w *faultyWorld) separate(groups ...[]*node) {
	for _, a := range w.nodes {
		for _, b := range w.nodes {
			together := a == b
			for _, g := range groups {
				together = together || contains(g, a) && contains(g, b)
			}
			if !together {
				w.network.Cut(a.name, b.name)
			}
		}
	}
}

func contains(group []*node, n *node) bool {
	for _, m := range group {
		if m == n {
			return true
		}
	}
	return false
}

// victim is the leader, mostly.
func (w *faultyWorld) victim() *node {
	if l := w.leader(); l != nil && w.random.IntN(3) > 0 {
		return l
	}
	return w.nodes[w.random.IntN(len(w.nodes))]
}

func without(nodes []*node, gone ...*node) (rest []*node) {
	for _, n := range nodes {
		if !contains(gone, n) {
			rest = append(rest, n)
		}
	}
	return rest
}

// nemeses by name: each does one thing once. What it cut or stopped is put right after it.
var nemeses = map[string]func(w *faultyWorld){
	"full partition": func(w *faultyWorld) {
		w.separate(without(w.nodes, w.victim()))
		time.Sleep(w.between(300, 4000))
	},
	"halves": func(w *faultyWorld) {
		order := w.random.Perm(len(w.nodes))
		var a, b []*node
		for i, at := range order {
			if i <= len(order)/2 {
				a = append(a, w.nodes[at])
			} else {
				b = append(b, w.nodes[at])
			}
		}
		w.separate(a, b)
		time.Sleep(w.between(300, 4000))
	},
	"one way": func(w *faultyWorld) {
		victim, outward := w.victim(), w.random.IntN(2) == 0
		for _, n := range w.nodes {
			if outward {
				w.network.Cut(victim.name, n.name)
			} else {
				w.network.Cut(n.name, victim.name)
			}
		}
		time.Sleep(w.between(300, 4000))
	},
	"bridge": func(w *faultyWorld) { // one reaches all, and the two sides only it
		order := w.random.Perm(len(w.nodes))
		half := len(order) / 2
		a, b := []*node{w.nodes[order[0]]}, []*node{w.nodes[order[0]]}
		for i, at := range order[1:] {
			if i < half {
				a = append(a, w.nodes[at])
			} else {
				b = append(b, w.nodes[at])
			}
		}
		w.separate(a, b)
		time.Sleep(w.between(500, 4000))
	},
	"datacenter cut": func(w *faultyWorld) { // a minority of neighbours, the leader among them
		at := w.random.IntN(len(w.nodes))
		if l := w.leader(); l != nil {
			for i, n := range w.nodes {
				if n == l {
					at = i
				}
			}
		}
		var gone []*node
		for i := range (len(w.nodes) - 1) / 2 {
			gone = append(gone, w.nodes[(at+i)%len(w.nodes)])
		}
		w.separate(gone, without(w.nodes, gone...))
		time.Sleep(w.between(500, 4000))
	},
	"flapping": func(w *faultyWorld) {
		victim := w.victim()
		for range 10 {
			w.separate(without(w.nodes, victim))
			time.Sleep(w.between(20, 300))
			w.network.MendAll()
			time.Sleep(w.between(20, 300))
		}
	},
	"kill": func(w *faultyWorld) {
		victim := w.victim()
		w.stop(victim)
		for n := range (len(w.nodes) - 1) / 2 {
			if other := w.nodes[w.random.IntN(len(w.nodes))]; n > 0 && other != victim {
				w.stop(other)
				break
			}
		}
		time.Sleep(w.between(0, 2000))
	},
	"kill all": func(w *faultyWorld) {
		for _, n := range w.nodes {
			w.stop(n)
			time.Sleep(w.between(0, 20))
		}
	},
	"transfer": func(w *faultyWorld) {
		for range 10 {
			if l := w.leader(); l != nil {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				w.at(l).TransferLeadership(ctx)
				cancel()
			}
			time.Sleep(200 * time.Millisecond)
		}
	},
	"freeze": func(w *faultyWorld) { // nothing of it is heard, nor written, and then all of it
		victim := w.victim()
		w.frozen.Store(victim)
		w.separate(without(w.nodes, victim))
		time.Sleep(w.between(500, 4000))
		w.frozen.Store(nil)
	},
	"cut and kill": func(w *faultyWorld) { // a leader that nobody hears dies with its tail
		victim := w.victim()
		w.separate(without(w.nodes, victim))
		time.Sleep(w.between(0, 300))
		w.stop(victim)
		time.Sleep(w.between(300, 1500))
	},
}

var nemesisNames = []string{"full partition", "halves", "one way", "bridge", "datacenter cut", "flapping", "kill", "kill all", "transfer", "freeze", "cut and kill"}

// linear runs a world and returns what its clients saw.
func linear(t *testing.T, seed uint64, voters int, length time.Duration, prepare func(*faultyWorld), nemesis func(*faultyWorld)) (h *history) {
	synctest.Test(t, func(t *testing.T) {
		w := newFaultyWorld(t, seed, voters)
		if prepare != nil {
			prepare(w)
		}
		w.run(seed, length, func() { nemesis(w) })
		h = &w.history
	})
	return h
}

func (h *history) check() porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(sequential, h.ops, time.Minute)
}

// soak lengthens what CI runs short: ENTENTE_SOAK is how many seeds, each ten times as long.
func soak() int {
	n, _ := strconv.Atoi(os.Getenv("ENTENTE_SOAK"))
	return n
}

// Writes, compare and swap, one-time tokens and barrier reads are linearizable, whatever
// happens to the network and to the nodes (I9, I10), in clusters of three and five.
// Each kind of fault also runs by itself.
func TestLinearizable(t *testing.T) {
	length, seeds, brief := 8*time.Second, 1, true
	if n := soak(); n > 0 {
		brief = false
		length, seeds = 2*time.Minute, n
	}
	everything := func(w *faultyWorld) { nemeses[nemesisNames[w.random.IntN(len(nemesisNames))]](w) }
	for _, voters := range []int{3, 5} {
		for _, name := range append([]string{"everything"}, nemesisNames...) {
			if (brief && voters == 3 || testing.Short()) && name != "everything" || name == "bridge" && voters == 3 {
				continue
			}
			t.Run(fmt.Sprintf("%d voters/%s", voters, name), func(t *testing.T) {
				t.Parallel()
				for seed := range uint64(seeds) {
					nemesis := nemeses[name]
					if nemesis == nil {
						nemesis = everything
					}
					h := linear(t, seed, voters, length, nil, nemesis)
					if t.Failed() {
						return
					}
					if result := h.check(); result != porcupine.Ok {
						t.Fatalf("seed %d: %d calls: %v", seed, len(h.ops), result)
					}
					t.Logf("seed %d: %v", seed, h.seen)
					for _, what := range []string{"p bool", "c bool", "r bool", "g string"} {
						if h.seen[what] < 10 {
							t.Errorf("only %d calls of %q came through", h.seen[what], what)
						}
					}
				}
			})
		}
	}
}

// The controls: reads without a barrier, and a token that admits two keys, are found.
func TestLinearizableSeesFaults(t *testing.T) {
	t.Parallel()
	t.Run("reads without a barrier", func(t *testing.T) {
		h := linear(t, 1, 3, 20*time.Second, func(w *faultyWorld) { w.blind = true }, nemeses["full partition"])
		if result := h.check(); result != porcupine.Illegal {
			t.Errorf("stale reads were not found: %v", result)
		}
	})
	t.Run("a token used twice", func(t *testing.T) {
		h := linear(t, 1, 3, 4*time.Second, nil, nemeses["transfer"])
		if result := h.check(); result != porcupine.Ok {
			t.Fatalf("control: %v", result)
		}
		for i, op := range h.ops {
			if op.Input.(call).kind == 'r' && op.Output == false {
				h.ops[i].Output = true
				if result := h.check(); result != porcupine.Illegal {
					t.Errorf("a second key was admitted, and nobody noticed: %v", result)
				}
				return
			}
		}
		t.Error("no token was tried twice: the test sees nothing")
	})
}
