package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// measureReissue has real agents hold 10,000 SVIDs and taints the authority of all.
func measureReissue(ctx context.Context, b *bench) error {
	hosts, each := b.count(10, 2), b.count(1000, 20)
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	var entries []*statev1.Entry
	for h := range hosts {
		for i := range each {
			entries = append(entries, entry(fmt.Sprintf("svc-%d-%d", h, i), hostName(h)))
		}
	}
	if err := d.nodes[0].createEntries(ctx, entries); err != nil {
		return err
	}
	b.say("%d agents take %d SVIDs each", hosts, each)
	for h := range hosts {
		if _, err := d.agent(ctx, hostName(h)); err != nil {
			return err
		}
	}
	var times []time.Duration
	var used time.Duration
	for range b.count(3, 1) {
		// Agents are ready when they hold all.
		before := make([]float64, hosts)
		for h, a := range d.agents {
			if before[h], err = a.signed(ctx); err != nil {
				return err
			}
		}
		b.say("taint")
		cpu, err := d.cpu()
		if err != nil {
			return err
		}
		took, err := d.taint(ctx, func() error {
			for h, a := range d.agents {
				err := d.until(ctx, a.name+" holds SVIDs of another authority", func(ctx context.Context) error {
					now, err := a.signed(ctx)
					if err == nil && now-before[h] < float64(each) {
						err = fmt.Errorf("it holds %.0f of %d", now-before[h], each)
					}
					return err
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		times = append(times, took)
		now, err := d.cpu()
		if err != nil {
			return err
		}
		used += now - cpu
	}
	b.report("taint_reissue_10k_s", percentile(times, 50).Seconds(), hosts*each*len(times),
		"median of %d, longest %.1f s; %d real agents with %d entries each on the CA node's own machine, as their metrics say that they use the new ones", len(times), percentile(times, 100).Seconds(), hosts, each)
	b.report("taint_reissue_10k_cpu_us", perItem(used, hosts*each*len(times)), hosts*each*len(times), "all that they use from shortly before the taint until then")
	return nil
}

// signed is how many SVIDs for entries the agent has taken into use since its start.
func (a *agent) signed(ctx context.Context) (n float64, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.listen+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "entente_agent_svids_signed_total "); ok {
			_, err := fmt.Sscan(value, &n)
			return n, err
		}
	}
	return 0, fmt.Errorf("%s does not say how many SVIDs were signed", a.name)
}
