package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/scenarios/evil"
	"github.com/entente-mesh/entente/scenarios/process"
)

// measureHealing has one of three CA nodes lie to an agent, again and again.
func measureHealing(ctx context.Context, b *bench) error {
	var longest time.Duration
	rounds := b.count(3, 1)
	for range rounds {
		took, err := b.heal(ctx)
		if err != nil {
			return err
		}
		longest = max(longest, took)
	}
	b.report("capture_healed_s", longest.Seconds(), rounds,
		"the longest; one of three CA nodes shows a root of its own, a revision that nothing honest reaches, and itself as the only CA node; from when the agent holds it until it holds the honest nodes' state; it is not restarted")
	return nil
}

func (b *bench) heal(ctx context.Context) (time.Duration, error) {
	d, err := b.domain(ctx, 3)
	if err != nil {
		return 0, err
	}
	defer d.close()
	liar := d.nodes[2]
	liar.kill()
	exe, err := os.Executable()
	if err != nil {
		return 0, err
	}
	orders := evil.Orders{Config: liar.file(), Lies: []string{"own-root", fmt.Sprintf("ahead-%x", evil.FarAhead), "alone"}}
	liar.process, err = b.processes.Start(process.Spec{Name: "evil " + liar.name, Binary: exe, Env: orders.Env(), Log: filepath.Join(liar.dir, "evil.log")})
	if err != nil {
		return 0, err
	}
	if err := liar.attach(ctx); err != nil {
		return 0, err
	}
	if _, _, err := d.leader(ctx); err != nil {
		return 0, err
	}
	a, err := d.agent(ctx, hostName(0))
	if err != nil {
		return 0, err
	}
	// It takes any of the three: at some start it asks the liar.
	const most = 30
	for range most {
		var is *admin.Status
		err = d.until(ctx, "the agent compares CA nodes", func(ctx context.Context) (err error) {
			if is, err = admin.NewClient(a.adminSocket).Status(ctx); err == nil && len(is.CA.Compared) < 2 {
				err = errors.New("not yet")
			}
			return err
		})
		if err != nil {
			return 0, err
		}
		if is.CA.Node == liar.name {
			return d.healed(ctx, a, liar)
		}
		a.kill()
		if err := a.start(ctx); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("an agent that was started %d times never asked the CA node that lies", most)
}

func (d *domain) healed(ctx context.Context, a *agent, liar *caNode) (time.Duration, error) {
	if err := syscall.Kill(liar.process.PID(), syscall.SIGUSR1); err != nil {
		return 0, err
	}
	captured := func(is bool) error {
		return d.until(ctx, fmt.Sprintf("captured: %t", is), func(ctx context.Context) error {
			now, err := admin.NewClient(a.adminSocket).Status(ctx)
			if err == nil && (now.Revision >= evil.FarAhead) != is {
				err = fmt.Errorf("it holds revision %s", ca.Revision(now.Revision))
			}
			return err
		})
	}
	if err := captured(true); err != nil {
		return 0, err
	}
	began := time.Now()
	err := captured(false)
	return time.Since(began), err
}

// measureComparing opens streams of 10,000 hosts to one of three CA nodes, without the
// statements of the others and with them.
func measureComparing(ctx context.Context, b *bench) error {
	count := b.count(10_000, 50)
	d, err := b.domain(ctx, 3)
	if err != nil {
		return err
	}
	defer d.close()
	subscribers, err := d.admitAll(ctx, count)
	if err != nil {
		return err
	}
	asked := d.nodes[0] // all dial the first of the members, who stand in another order
	for _, n := range d.nodes {
		if n.config.Listen.API == subscribers[0].members[0].GetApiAddress() {
			asked = n
		}
	}
	window := max(3*b.while(), 5*time.Second) // statements come every four seconds
	used := func(level uint32) (percent float64, statements int64, err error) {
		ctx, cancel := context.WithCancel(ctx)
		all := &audience{bench: b, size: count, level: level}
		defer all.held.Wait()
		defer cancel()
		if err := all.openAll(ctx, subscribers); err != nil {
			return 0, 0, err
		}
		b.say("%d streams open at level %d", count, level)
		if err := sleep(ctx, 2*b.while()); err != nil {
			return 0, 0, err
		}
		before := all.statements.Load()
		percent, err = asked.idle(ctx, window)
		return percent, all.statements.Load() - before, err
	}
	var without, with []float64
	var heard int64
	for range b.count(2, 1) {
		percent, none, err := used(0)
		if err != nil {
			return err
		}
		without = append(without, percent)
		percent, some, err := used(ca.SyncLevel)
		if err != nil {
			return err
		}
		if with = append(with, percent); none != 0 || some == 0 {
			return fmt.Errorf("%d statements came to those who compare nothing, %d to the others", none, some)
		}
		heard += some
	}
	b.report("compare_10k_pct", mean(with)-mean(without), count,
		"%.1f %% of a core with %d streams that compare, %.1f %% with as many that do not, %d times in turn; %d statements came; the node's own statement and its questions to the two others are in both",
		mean(with), count, mean(without), len(with), heard)
	return nil
}

func mean(list []float64) (sum float64) {
	for _, x := range list {
		sum += x / float64(len(list))
	}
	return sum
}
